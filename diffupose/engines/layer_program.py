"""A denoiser as a list of layers over buffers: what the engines pack and run.

Buffers hold ``[poses, J, width]``. Buffer 0 is the input (x_t beside the condition), the last one the output. A layer
names buffers by their index. Everything that does not depend on the pose is folded: BatchNorm and attention's scale
into weights, the time embedding into scales and shifts that are tabulated for the chosen timesteps.

CONTRIBUTING lists what a new kind of layer touches; ``tests/engines/test_layer_kinds.py`` checks the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

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

    def check(self, num_joints: int) -> None:
        """Raise ValueError unless the tensors fit each other and the number of joints."""
        if self.weight.ndim != 3 or self.weight.shape[0] != 2:
            raise ValueError(f"weight must have shape [2, C_in, C_out], got {tuple(self.weight.shape)}")
        c_out = self.weight.shape[2]
        check_shape("own", self.own, [num_joints, c_out])
        check_shape("neighbors", self.neighbors, [num_joints, c_out])
        check_shape("adjacency", self.adjacency, [num_joints, num_joints])
        check_shape("bias", self.bias, [c_out])
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be none, relu or gelu, got {self.activation!r}")

    def widths(self) -> tuple[int, int]:
        """Return the channels that come in and go out."""
        return self.weight.shape[1], self.weight.shape[2]


@dataclass(frozen=True)
class Linear:
    """x W + bias + residual."""

    input: int
    output: int
    weight: Tensor  # [C_in, C_out]
    bias: Tensor  # [C_out] or [J, C_out]
    residual: int = -1

    def check(self, num_joints: int) -> None:
        """Raise ValueError unless the tensors fit each other and the number of joints."""
        if self.weight.ndim != 2:
            raise ValueError(f"weight must have shape [C_in, C_out], got {tuple(self.weight.shape)}")
        check_shape("bias", self.bias, [self.weight.shape[1]], [num_joints, self.weight.shape[1]])

    def widths(self) -> tuple[int, int]:
        """Return the channels that come in and go out."""
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True)
class ScaleShift:
    """normalized(x) * scale + shift (LayerNorm and FiLM), or silu(x * scale + shift); ``slot`` counts these layers."""

    input: int
    output: int
    slot: int
    channels: int
    normalize: bool
    eps: float = 0.0
    residual: ClassVar[int] = -1

    def check(self, num_joints: int) -> None:
        """Raise ValueError unless there is a channel."""
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")

    def widths(self) -> tuple[int, int]:
        """Return the channels that come in and go out."""
        return self.channels, self.channels


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T) v by heads; the input holds queries, keys and values of all heads, in this order."""

    input: int
    output: int
    num_heads: int
    channels: int  # of one head
    residual: ClassVar[int] = -1

    def check(self, num_joints: int) -> None:
        """Raise ValueError unless there is a head with a channel."""
        if self.num_heads < 1 or self.channels < 1:
            raise ValueError(f"attention needs a head and a channel, got {self.num_heads} and {self.channels}")

    def widths(self) -> tuple[int, int]:
        """Return the channels that come in and go out."""
        width = self.num_heads * self.channels
        return 3 * width, width


Layer = GraphConv | Linear | ScaleShift | Attention


@dataclass(frozen=True)
class LayerProgram:
    """Layers over buffers, checked when it is made.

    Attributes:
        num_joints: J.
        widths: Channels of every buffer; layers read and write whole buffers.
        layers: In the order in which they run.
        tabulate: Returns the scale and shift of every slot for timesteps ``[S]``: pairs of ``[S, channels]``.

    Raises:
        ValueError: If tensors do not fit each other, a layer does not fit its buffers or overwrites its input, reads
            what nothing has written, or nothing writes the last buffer.
    """

    num_joints: int
    widths: tuple[int, ...]
    layers: tuple[Layer, ...]
    tabulate: Callable[[Tensor], list[tuple[Tensor, Tensor]]]

    def __post_init__(self) -> None:
        written, slots = {0}, 0
        for number, layer in enumerate(self.layers):
            layer.check(self.num_joints)
            self._check_buffers(number, layer, written)
            written.add(layer.output)
            if isinstance(layer, ScaleShift):
                if layer.slot != slots:
                    raise ValueError(
                        f"slots must count the layers that scale and shift, expected {slots}, got {layer.slot}"
                    )
                slots += 1
            elif layer.output == layer.input:
                raise ValueError(f"layer {number} must not overwrite its input, buffer {layer.input}")
        if len(self.widths) - 1 not in written:
            raise ValueError(f"a layer must write the last buffer, {len(self.widths) - 1}")

    def _check_buffers(self, number: int, layer: Layer, written: set[int]) -> None:
        c_in, c_out = layer.widths()
        buffers = {"input": (layer.input, c_in), "output": (layer.output, c_out)}
        if layer.residual >= 0:
            buffers["residual"] = layer.residual, c_out
        for name, (buffer, channels) in buffers.items():
            if not 0 <= buffer < len(self.widths):
                raise ValueError(f"{name} of layer {number} must lie in [0, {len(self.widths)}), got {buffer}")
            width = self.widths[buffer]
            if width != channels:
                raise ValueError(f"{name} of layer {number} must be {channels} wide, buffer {buffer} is {width} wide")
            if name != "output" and buffer not in written:
                raise ValueError(f"{name} of layer {number} must be written before it, buffer {buffer} is not")


def check_shape(name: str, value: Tensor, *shapes: list[int]) -> None:
    """Raise ValueError unless a tensor has one of these shapes."""
    if list(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
