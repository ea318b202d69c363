"""Layer programs in plain formulas, in any precision: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from diffupose.engines.layer_program import Attention, GraphConv, Layer, LayerProgram, Linear, ScaleShift

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "gelu": functional.gelu}


def through_bfloat16(x: Tensor) -> Tensor:
    """Return the nearest bfloat16 values in the type of x."""
    return x.to(torch.float32).to(torch.bfloat16).to(x.dtype)


def run_program(
    program: LayerProgram,
    sample: Tensor,
    condition: Tensor,
    timesteps: Tensor,
    dtype: torch.dtype = torch.float64,
    rounding: Callable[[Tensor], Tensor] = lambda x: x,
    storing: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the output buffer ``[N, J, width]``.

    ``rounding`` is applied to both operands of every product, ``storing`` to all buffers but the output; what a layer
    scales and shifts in place, without normalising, was not stored before.
    """
    buffers = {0: storing(torch.cat((sample, condition), dim=-1).to(dtype))}
    parameters = [(scale.to(dtype), shift.to(dtype)) for scale, shift in program.tabulate(timesteps)]
    for layer, following in zip(program.layers, (*program.layers[1:], None), strict=True):
        result = FORMULAS[type(layer)](layer, buffers[layer.input], parameters, rounding)
        if layer.residual >= 0:
            result = result + buffers[layer.residual]
        is_output = layer.output == len(program.widths) - 1
        buffers[layer.output] = result if is_output or _scales_in_place(following, layer) else storing(result)
    return buffers[len(program.widths) - 1]


def _scales_in_place(layer: Layer | None, before: Layer) -> bool:
    return isinstance(layer, ScaleShift) and not layer.normalize and layer.input == layer.output == before.output


Pairs = list[tuple[Tensor, Tensor]]
Rounding = Callable[[Tensor], Tensor]


def _graph_conv(layer: GraphConv, x: Tensor, pairs: Pairs, rounding: Rounding) -> Tensor:
    own, neighbors = (rounding(x) @ rounding(weight.to(x.dtype)) for weight in layer.weight)  # [N, J, C_out]
    mixed = layer.adjacency.to(x.dtype) @ (layer.neighbors.to(x.dtype) * neighbors)
    return ACTIVATIONS[layer.activation](layer.own.to(x.dtype) * own + mixed + layer.bias.to(x.dtype))


def _linear(layer: Linear, x: Tensor, pairs: Pairs, rounding: Rounding) -> Tensor:
    return rounding(x) @ rounding(layer.weight.to(x.dtype)) + layer.bias.to(x.dtype)


def _attention(layer: Attention, x: Tensor, pairs: Pairs, rounding: Rounding) -> Tensor:
    heads = x.unflatten(-1, (3, layer.num_heads, layer.channels))
    query, key, value = heads.permute(2, 0, 3, 1, 4)  # [N, heads, J, channels] each
    attended = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
    return attended.transpose(1, 2).flatten(2)


def _scale_shift(layer: ScaleShift, x: Tensor, pairs: Pairs, rounding: Rounding) -> Tensor:
    scale, shift = pairs[layer.slot]
    if not layer.normalize:
        return functional.silu(x * scale + shift)
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / (centered.square().mean(dim=-1, keepdim=True) + layer.eps).sqrt() * scale + shift


FORMULAS = {GraphConv: _graph_conv, Linear: _linear, Attention: _attention, ScaleShift: _scale_shift}
