"""A denoiser as a list of layers over buffers: what the C++ engine packs and runs, tile by tile.

Buffers hold ``[poses, J, width]``; buffer 0 is the input (x_t beside the condition), the last one the output. A layer
names buffers by their index. Everything that does not depend on the pose is folded: BatchNorm and attention's scale
into weights, the time embedding into parameters that are tabulated for the chosen timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["none", "relu", "gelu"]


@dataclass(frozen=True)
class GraphConv:
    """activation(bias + own * (x W0) + offdiag(A) (neighbors * (x W1))) + residual."""

    input: int
    output: int
    weight: Tensor  # [2, C_in, C_out]
    own: Tensor  # [J, C_out]: diag(A) times the modulation
    neighbors: Tensor  # [J, C_out]: the modulation
    adjacency: Tensor  # [J, J], diagonal 0
    bias: Tensor  # [C_out]
    activation: Activation = "none"
    residual: int = -1


@dataclass(frozen=True)
class Linear:
    """x W + bias + residual."""

    input: int
    output: int
    weight: Tensor  # [C_in, C_out]
    bias: Tensor  # [C_out] or [J, C_out]
    residual: int = -1


@dataclass(frozen=True)
class ScaleShift:
    """normalized(x) * scale + shift (LayerNorm and FiLM), or silu(x * scale + shift); ``slot`` counts these layers."""

    input: int
    output: int
    slot: int
    channels: int
    normalize: bool
    eps: float = 0.0


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T) v by heads; the input holds queries, keys and values of all heads, in this order."""

    input: int
    output: int
    num_heads: int
    channels: int  # of one head


Layer = GraphConv | Linear | ScaleShift | Attention


@dataclass(frozen=True)
class LayerProgram:
    """Layers, and the scale and shift of every slot for timesteps ``[S]``: pairs of ``[S, channels]``."""

    num_joints: int
    widths: tuple[int, ...]
    layers: tuple[Layer, ...]
    tabulate: Callable[[Tensor], list[tuple[Tensor, Tensor]]]


def check_buffers(program: LayerProgram) -> None:
    """Raise unless every layer reads what was written before it, and takes buffers as wide as they are."""
    written = {0}
    for number, layer in enumerate(program.layers):
        c_in, c_out = _channels_of(layer)
        residual = getattr(layer, "residual", -1)
        for name, buffer, channels in (
            ("input", layer.input, c_in),
            ("output", layer.output, c_out),
            ("residual", residual, c_out),
        ):
            if name == "residual" and buffer < 0:
                continue
            if not 0 <= buffer < len(program.widths):
                raise ValueError(f"{name} of layer {number} must lie in [0, {len(program.widths)}), got {buffer}")
            if program.widths[buffer] != channels:
                width = program.widths[buffer]
                raise ValueError(f"{name} of layer {number} must be {channels} wide, buffer {buffer} is {width} wide")
            if name != "output" and buffer not in written:
                raise ValueError(f"{name} of layer {number} must be written before it, buffer {buffer} is not")
        written.add(layer.output)
    if len(program.widths) - 1 not in written:
        raise ValueError(f"a layer must write the last buffer, {len(program.widths) - 1}")


def _channels_of(layer: Layer) -> tuple[int, int]:
    if isinstance(layer, GraphConv | Linear):
        return layer.weight.shape[-2], layer.weight.shape[-1]
    if isinstance(layer, Attention):
        width = layer.num_heads * layer.channels
        return 3 * width, width
    return layer.channels, layer.channels
