"""A layer program as the CUDA engine runs it: layers are split, and buffers placed in the memory of a tile.

``csrc/engine/cuda/engine_cuda.h`` says what a layer's record holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffupose.engines.cuda_layouts import BLOCK, Layout, LayoutName, channel_blocks, layout_of
from diffupose.engines.engine import parameter_slots
from diffupose.engines.layer_program import Attention, GraphConv, LayerProgram, Linear, ScaleShift

_ALIGNMENT = 128  # bytes, of buffers


def padded(channels: int) -> int:
    """Return the channels as they lie in memory."""
    return BLOCK * channel_blocks(channels)


def unfit(program: LayerProgram, max_joints: int) -> str | None:
    """Return why the CUDA engine cannot run a program, or None."""
    if program.num_joints > max_joints:
        return f"the CUDA engine takes {max_joints} joints at most, got {program.num_joints}"
    last = len(program.widths) - 1
    taken: set[int] = set()  # queries, keys and values that attention has used up
    for before, layer in zip((None, *program.layers), program.layers, strict=False):
        if isinstance(layer, Attention):
            if layer.channels % BLOCK:
                return f"the CUDA engine takes heads of a multiple of {BLOCK} channels, got {layer.channels}"
            if not isinstance(before, Linear) or before.output != layer.input or before.residual >= 0:
                return "the CUDA engine takes attention behind the linear layer of its queries, keys and values only"
        if last in (layer.input, layer.residual) or (
            layer.output == last and not isinstance(layer, GraphConv | Linear)
        ):
            return "the CUDA engine takes a last buffer that a product writes and nothing reads"
        if taken & {layer.input, layer.residual}:
            return "the CUDA engine takes queries, keys and values that attention alone reads"
        taken = (taken | {layer.input} if isinstance(layer, Attention) else taken) - {layer.output}
    return None


@dataclass
class _Value:
    """What a layer writes. It lives from its first writing to its last reading, counted in layers."""

    size: int  # bytes
    first: int  # -1: the input
    last: int
    offset: int = -1

    def overlaps(self, other: _Value) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass
class _Lowered:
    """A layer of the engine: its record's numbers, the values it names and the tensors it points to."""

    kind: str
    input: _Value
    output: _Value
    residual: _Value | None = None
    weights: _Value | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedProgram:
    """What the engine needs: the records' bytes, and where the input and the output lie in a tile's memory."""

    records: bytes
    num_layers: int
    tensors: tuple[Tensor, ...]  # that the records point to
    input: int
    output: int
    tile_bytes: int


def pack_program(
    program: LayerProgram, bfloat16: bool, device: torch.device, extension: ModuleType, layout_name: LayoutName
) -> PackedProgram:
    """Return a program packed for a device.

    Args:
        program: One that ``unfit`` finds nothing against.
        bfloat16: Whether weights and activations are bfloat16, else float32.
        device: Where the weights go.
        extension: The CUDA extension, which makes the records.
        layout_name: See ``layout_of``.
    """
    layout = layout_of(layout_name, program.num_joints, bfloat16, extension)
    lowering = _Lowering(program, layout, 2 if bfloat16 else 4)
    lowering.run()
    tile_bytes = -(-_place(lowering.values) // _ALIGNMENT) * _ALIGNMENT + layout.staging_bytes
    records: list[bytes] = []
    kept: list[Tensor] = []
    for layer in lowering.layers:
        tensors = {name: layout.pack(name, tensor).to(device) for name, tensor in layer.tensors.items()}
        kept += tensors.values()
        records.append(
            extension.layer_record(
                kind=layer.kind,
                input=layer.input.offset,
                output=layer.output.offset,
                residual=-1 if layer.residual is None else layer.residual.offset,
                weights=-1 if layer.weights is None else layer.weights.offset,
                **layer.numbers,
                **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            )
        )
    return PackedProgram(
        b"".join(records), len(records), tuple(kept), lowering.source.offset, lowering.result.offset, tile_bytes
    )


class _Lowering:
    """Turns layers into those of the engine, and buffers into values with a life."""

    def __init__(self, program: LayerProgram, layout: Layout, element_bytes: int) -> None:
        self.program, self.layout, self.element_bytes = program, layout, element_bytes
        self.layers: list[_Lowered] = []
        self.values: list[_Value] = []
        self.slots = parameter_slots(program, padded)
        self.source = self._value(self._bytes(program.widths[0], element_bytes), at=-1)
        self.buffers = {0: self.source}

    def run(self) -> None:
        """Lower all layers."""
        for index, layer in enumerate(self.program.layers):
            _LOWER[type(layer)](self, layer, index)
        self.result = self.buffers[len(self.program.widths) - 1]
        self.result.last = len(self.layers)  # read behind the layers
        if self.layout.by_phase:
            self._count_lives_in_phases()

    def _count_lives_in_phases(self) -> None:
        """Make lives begin and end with phases, each of which ends with a product.

        Blocks of a cluster meet behind products only: while one is at the beginning of a phase, another may store what
        the phase's product gives. What is read behind the last product is read while others store the first one's.
        """
        phases = [0]
        for layer in self.layers:
            phases.append(phases[-1] + (layer.kind in ("graph_conv", "linear")))
        for value in self.values:
            value.first, value.last = phases[max(value.first, 0)], phases[value.last]
            if value.last == phases[-1] or value is self.source:
                value.first, value.last = 0, phases[-1]

    def _bytes(self, channels: int, element_bytes: int) -> int:
        return self.layout.joints * self.layout.tile_poses * padded(channels) * element_bytes

    def _value(self, size: int, at: int) -> _Value:
        value = _Value(size, at, at)
        self.values.append(value)
        return value

    def _read(self, buffer: int) -> _Value:
        value = self.buffers[buffer]
        value.last = len(self.layers)
        return value

    def _write(self, buffer: int, channels: int, in_place: bool, element_bytes: int | None = None) -> _Value:
        if in_place:
            return self._read(buffer)
        size = self._bytes(channels, self.element_bytes if element_bytes is None else element_bytes)
        self.buffers[buffer] = value = self._value(size, len(self.layers))
        return value

    def _linear(self, layer: Linear, index: int) -> None:
        following = self.program.layers[index + 1 : index + 2]
        if not (following and isinstance(following[0], Attention)):  # which takes its linear layer along
            self._product(layer, index)

    def _product(self, layer: GraphConv | Linear, index: int) -> None:
        is_output = layer.output == len(self.program.widths) - 1
        channels = layer.weight.shape[-1]
        source = self._read(layer.input)
        residual = self._read(layer.residual) if layer.residual >= 0 else None
        # By phases a layer alone may still read what this one would overwrite.
        in_place = layer.residual == layer.output and not self.layout.by_phase
        target = self._write(layer.output, channels, in_place, 4 if is_output else None)
        numbers: dict[str, Any] = {
            "input_blocks": channel_blocks(layer.weight.shape[-2]),
            "output_blocks": channel_blocks(channels),
            "output_is_float": is_output,
        }
        if isinstance(layer, GraphConv):
            numbers["activation"] = layer.activation
            names = ("weight", "own", "neighbors", "adjacency", "bias")
            tensors = {name: getattr(layer, name) for name in names}
            self.layers.append(_Lowered("graph_conv", source, target, residual, None, numbers, tensors))
        else:
            numbers["bias_per_joint"] = layer.bias.ndim == 2
            tensors = {"weight": layer.weight.unsqueeze(0), "bias": layer.bias}
            self.layers.append(_Lowered("linear", source, target, residual, None, numbers, tensors))

    def _scale_shift(self, layer: ScaleShift, index: int) -> None:
        blocks, first = channel_blocks(layer.channels), self.slots[layer.slot][0]
        before = self.layers[-1] if self.layers else None
        if (
            not layer.normalize
            and layer.input == layer.output
            and before is not None
            and before.output is self.buffers[layer.input]
            and before.kind in ("graph_conv", "linear")
            and before.numbers["output_blocks"] == blocks
            and not before.numbers.get("film")
        ):
            before.numbers |= {"film": True, "parameters": first}  # on its way out
            return
        source = self._read(layer.input)
        target = self._write(layer.output, layer.channels, layer.input == layer.output)
        numbers = {
            "input_blocks": blocks, "output_blocks": blocks, "channels": layer.channels, "normalize": layer.normalize,
            "eps": layer.eps, "parameters": first,
        }  # fmt: skip
        self.layers.append(_Lowered("scale_shift", source, target, None, None, numbers))

    def _attention(self, attention: Attention, index: int) -> None:
        """Queries and keys, their weights, then the values and what comes out: never all of them at once."""
        linear = self.program.layers[index - 1]
        assert isinstance(linear, Linear)
        layout, heads, width = self.layout, attention.num_heads, attention.num_heads * attention.channels
        source = self._read(linear.input)

        def columns(first: int, last: int) -> _Value:
            target = self._write(linear.output, last - first, in_place=False)
            numbers = {
                "input_blocks": channel_blocks(linear.weight.shape[0]), "output_blocks": channel_blocks(last - first),
                "bias_per_joint": linear.bias.ndim == 2,
            }  # fmt: skip
            tensors = {"weight": linear.weight[:, first:last].unsqueeze(0), "bias": linear.bias[..., first:last]}
            self.layers.append(_Lowered("linear", source, target, None, None, numbers, tensors))
            return target

        queries_and_keys = columns(0, 2 * width)
        queries_and_keys.last = len(self.layers)
        weights = self._value(4 * heads * layout.joints**2 * layout.tile_poses, len(self.layers))
        numbers = {"output_blocks": channel_blocks(width), "num_heads": heads}
        both = {**numbers, "input_blocks": channel_blocks(2 * width)}
        self.layers.append(_Lowered("attention_weights", queries_and_keys, weights, None, weights, both))
        self._read(linear.input)
        values = columns(2 * width, 3 * width)
        values.last = weights.last = len(self.layers)
        target = self._write(attention.output, width, in_place=False)
        numbers["input_blocks"] = channel_blocks(width)
        self.layers.append(_Lowered("attention_apply", values, target, None, weights, numbers))


_LOWER: dict[type, Callable[[_Lowering, Any, int], None]] = {
    GraphConv: _Lowering._product,
    Linear: _Lowering._linear,
    ScaleShift: _Lowering._scale_shift,
    Attention: _Lowering._attention,
}


def _place(values: list[_Value]) -> int:
    """Give every value an offset, so that those that live at the same time do not overlap; return the bytes in all."""
    placed: list[_Value] = []
    # Long lives first, and large ones: the rest goes between them.
    for value in sorted(values, key=lambda value: (value.first - value.last, -value.size)):
        offset = 0
        for other in sorted((other for other in placed if other.overlaps(value)), key=lambda other: other.offset):
            if offset + value.size <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.size) // _ALIGNMENT) * _ALIGNMENT)
        value.offset = offset
        placed.append(value)
    return max(value.offset + value.size for value in values)
