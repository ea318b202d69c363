"""How many operations a network needs: the one count that every benchmark quotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffupose.engines.layer_program import Attention, GraphConv, Linear, ScaleShift
from diffupose.engines.programs import layer_program


def denoiser_flops(denoiser: nn.Module, num_joints: int) -> int:
    """Return the floating-point operations of one call for one pose.

    A multiply-add is two. Products of graph convolutions (2 J C_in 2 C_out, and 2 J^2 C_out for the adjacency), linear
    layers over joints and attention count; time embeddings, which are tabulated, and activations do not.

    Raises:
        ValueError: If the network is not one of ours in evaluation mode.
    """
    return sum(_FLOPS[type(layer)](layer, num_joints) for layer in layer_program(denoiser).layers)


def _graph_conv(layer: GraphConv, joints: int) -> int:
    c_in, c_out = layer.widths()
    return 4 * joints * c_in * c_out + 2 * joints**2 * c_out


def _attention(layer: Attention, joints: int) -> int:
    return 4 * joints**2 * layer.num_heads * layer.channels


_FLOPS: dict[type, Callable[[Any, int], int]] = {
    GraphConv: _graph_conv,
    Linear: lambda layer, joints: 2 * joints * layer.weight.numel(),
    ScaleShift: lambda layer, joints: 0,
    Attention: _attention,
}
