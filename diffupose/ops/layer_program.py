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
