"""A layer program as the CUDA engine runs it: layers split, buffers placed in a tile's memory, weights packed.

The layouts are those below ``csrc/engine/cuda/``: ``fragments.cuh`` (``pairs``), for Hopper's kernel of many hypotheses
``persistent/wgmma_layers.cuh``, and for the kernel of few ones ``cluster/cluster_layers.cuh``; ``engine_cuda.h`` says
what a layer's record holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from diffupose.engines.layer_program import Attention, GraphConv, LayerProgram, Linear, ScaleShift

STEP = 16
"""Channels are padded to a multiple of this, the depth of one matrix instruction."""
_ALIGNMENT = 128  # bytes, of buffers

Layout = Literal["pairs", "wgmma", "cluster"]


def steps_of(channels: int) -> int:
    """Return the number of steps of 16 channels that hold these."""
    return -(-channels // STEP)


def unfit(program: LayerProgram, max_joints: int) -> str | None:
    """Return why the CUDA engine cannot run a program, or None."""
    if program.num_joints > max_joints:
        return f"the CUDA engine takes {max_joints} joints at most, got {program.num_joints}"
    last = len(program.widths) - 1
    taken: set[int] = set()  # queries, keys and values that attention has used up
    for before, layer in zip((None, *program.layers), program.layers, strict=False):
        if isinstance(layer, Attention):
            if layer.channels % STEP:
                return f"the CUDA engine takes heads of a multiple of {STEP} channels, got {layer.channels}"
            if not isinstance(before, Linear) or before.output != layer.input or before.residual >= 0:
                return "the CUDA engine takes attention behind the linear layer of its queries, keys and values only"
        residual = getattr(layer, "residual", -1)
        if last in (layer.input, residual) or (layer.output == last and not isinstance(layer, GraphConv | Linear)):
            return "the CUDA engine takes a last buffer that a product writes and nothing reads"
        if isinstance(layer, GraphConv | Linear) and layer.input == layer.output:
            return "the CUDA engine takes products that do not overwrite their input"
        if taken & {layer.input, residual}:
            return "the CUDA engine takes queries, keys and values that attention alone reads"
        taken = (taken | {layer.input} if isinstance(layer, Attention) else taken) - {layer.output}
    return None


@dataclass
class _Value:
    """What a layer writes, from its first writing to its last reading (numbers of layers; the input comes before 0)."""

    size: int  # bytes
    first: int
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
    slots: tuple[tuple[int, int], ...]  # of the step's parameters: where scale begins, and its channels
    num_parameters: int


def pack_program(
    program: LayerProgram, bfloat16: bool, device: torch.device, extension: ModuleType, layout: Layout = "pairs"
) -> PackedProgram:
    """Return a program packed for a device.

    Args:
        program: One that ``unfit`` finds nothing against.
        bfloat16: Whether weights and activations are bfloat16, else float32.
        device: Where the weights go.
        extension: The CUDA extension, which makes the records.
        layout: ``"wgmma"`` takes bfloat16 and ``WGMMA_MAX_JOINTS`` joints, ``"cluster"`` bfloat16.
    """
    count, element_bytes = program.num_joints, 2 if bfloat16 else 4
    packers: dict[str, Callable[[Tensor], Tensor]]
    if layout == "cluster":
        # The tensors have as many joints as the adjacency is wide, the activations whole eights of them.
        joints = extension.ADJACENCY_STRIDE
        lowering = _Lowering(program, 8 * extension.cluster_tiles(count), element_bytes, tile_poses=1, by_phase=True)
        factors = dict.fromkeys(("own", "neighbors"), _pack_by_channel)
        packers = {"weight": _pack_cluster, "bias": partial(_pack_bias_by_channel, joints=joints), **factors}
    elif layout == "wgmma":
        joints = extension.wgmma_joints(count)
        lowering = _Lowering(program, joints, element_bytes, extension.TILE_POSES)
        pack = partial(_pack_wgmma, round_steps=extension.WGMMA_ROUND_STEPS, ahead=extension.WGMMA_STEPS_AHEAD)
        packers = {"weight": pack, "own": _pack_factors, "neighbors": _pack_factors, "adjacency": _pack_adjacency}
    else:
        joints = 2 * extension.joint_pairs(count)
        lowering = _Lowering(program, joints, element_bytes, extension.TILE_POSES)
        packers = {"weight": _pack_bfloat16 if bfloat16 else _pack_float32}
    lowering.run()
    tile_bytes = -(-_place(lowering.values) // _ALIGNMENT) * _ALIGNMENT
    if layout == "wgmma":
        tile_bytes += extension.WGMMA_STAGING_BYTES
    records: list[bytes] = []
    kept: list[Tensor] = []
    for layer in lowering.layers:
        tensors = {
            name: _packed(name, tensor, joints, extension.ADJACENCY_STRIDE, packers.get(name)).to(device)
            for name, tensor in layer.tensors.items()
        }
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
        b"".join(records), len(records), tuple(kept), lowering.source.offset, lowering.result.offset, tile_bytes,
        tuple(lowering.slots), lowering.num_parameters,
    )  # fmt: skip


class _Lowering:
    """Turns layers into those of the engine, and buffers into values with a life."""

    def __init__(
        self, program: LayerProgram, joints: int, element_bytes: int, tile_poses: int, by_phase: bool = False
    ) -> None:
        self.program, self.joints, self.element_bytes, self.tile_poses = program, joints, element_bytes, tile_poses
        self.by_phase = by_phase
        self.layers: list[_Lowered] = []
        self.values: list[_Value] = []
        self.slots: list[tuple[int, int]] = []
        self.num_parameters = 0
        self.source = self._value(self._bytes(program.widths[0], element_bytes), at=-1)
        self.buffers = {0: self.source}

    def run(self) -> None:
        """Lower all layers."""
        layers = self.program.layers
        for index, layer in enumerate(layers):
            following = layers[index + 1] if index + 1 < len(layers) else None
            if isinstance(layer, Linear) and isinstance(following, Attention):
                self._attention(layer, following)
            elif isinstance(layer, GraphConv | Linear):
                self._product(layer)
            elif isinstance(layer, ScaleShift):
                self._scale_shift(layer)
        self.result = self.buffers[len(self.program.widths) - 1]
        self.result.last = len(self.layers)  # read behind the layers
        if self.by_phase:
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
        return self.joints * self.tile_poses * STEP * steps_of(channels) * element_bytes

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

    def _product(self, layer: GraphConv | Linear) -> None:
        is_output = layer.output == len(self.program.widths) - 1
        channels = layer.weight.shape[-1]
        source = self._read(layer.input)
        residual = self._read(layer.residual) if layer.residual >= 0 else None
        # By phases a layer alone may still read what this one would overwrite.
        in_place = layer.residual == layer.output and not self.by_phase
        target = self._write(layer.output, channels, in_place, 4 if is_output else None)
        numbers: dict[str, Any] = {
            "input_steps": steps_of(layer.weight.shape[-2]),
            "output_steps": steps_of(channels),
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

    def _scale_shift(self, layer: ScaleShift) -> None:
        if layer.slot != len(self.slots):
            raise ValueError(
                f"slots must count the layers that scale and shift, expected {len(self.slots)}, got {layer.slot}"
            )
        steps = steps_of(layer.channels)
        first = self.num_parameters
        self.slots.append((first, layer.channels))
        self.num_parameters += 2 * STEP * steps
        before = self.layers[-1] if self.layers else None
        if (
            not layer.normalize
            and layer.input == layer.output
            and before is not None
            and before.output is self.buffers[layer.input]
            and before.kind in ("graph_conv", "linear")
            and before.numbers["output_steps"] == steps
            and not before.numbers.get("film")
        ):
            before.numbers |= {"film": True, "parameters": first}  # on its way out
            return
        source = self._read(layer.input)
        target = self._write(layer.output, layer.channels, layer.input == layer.output)
        numbers = {
            "input_steps": steps, "output_steps": steps, "channels": layer.channels, "normalize": layer.normalize,
            "eps": layer.eps, "parameters": first,
        }  # fmt: skip
        self.layers.append(_Lowered("scale_shift", source, target, None, None, numbers))

    def _attention(self, linear: Linear, attention: Attention) -> None:
        """Queries and keys, their weights, then the values and what comes out: never all of them at once."""
        width = attention.num_heads * attention.channels
        source = self._read(linear.input)

        def columns(first: int, last: int) -> _Value:
            target = self._write(linear.output, last - first, in_place=False)
            numbers = {
                "input_steps": steps_of(linear.weight.shape[0]), "output_steps": steps_of(last - first),
                "bias_per_joint": linear.bias.ndim == 2,
            }  # fmt: skip
            tensors = {"weight": linear.weight[:, first:last].unsqueeze(0), "bias": linear.bias[..., first:last]}
            self.layers.append(_Lowered("linear", source, target, None, None, numbers, tensors))
            return target

        queries_and_keys = columns(0, 2 * width)
        queries_and_keys.last = len(self.layers)
        weights = self._value(4 * attention.num_heads * self.joints**2 * self.tile_poses, len(self.layers))
        numbers: dict[str, Any] = {
            "input_steps": steps_of(2 * width), "output_steps": steps_of(width), "num_heads": attention.num_heads,
        }  # fmt: skip
        self.layers.append(_Lowered("attention_weights", queries_and_keys, weights, None, weights, numbers))
        self._read(linear.input)
        values = columns(2 * width, 3 * width)
        values.last = weights.last = len(self.layers)
        target = self._write(attention.output, width, in_place=False)
        numbers = {**numbers, "input_steps": steps_of(width)}
        self.layers.append(_Lowered("attention_apply", values, target, None, weights, numbers))


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


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """Return the tensor with zeros behind its last dimensions, up to these sizes."""
    padded = tensor.new_zeros(*tensor.shape[: tensor.ndim - len(sizes)], *sizes)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _packed(
    name: str, tensor: Tensor, joints: int, adjacency_stride: int, pack: Callable[[Tensor], Tensor] | None
) -> Tensor:
    tensor = tensor.detach().to("cpu", torch.float32)
    channels = STEP * steps_of(tensor.shape[-1])
    if name == "adjacency":
        tensor = _pad(tensor, joints, adjacency_stride)
    elif name == "weight":
        tensor = _pad(tensor, STEP * steps_of(tensor.shape[-2]), channels)
    else:
        tensor = _pad(tensor, joints, channels) if tensor.ndim == 2 else _pad(tensor, channels)
    return (tensor if pack is None else pack(tensor)).contiguous()


def _pack_bfloat16(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[block, step, lane, product, 4]``, see ``fragments.cuh``."""
    products, rows, columns = weight.shape
    # k = 16 step + 8 high + 2 t + low, n = 8 block + g
    split = weight.view(products, rows // STEP, 2, 4, 2, columns // 8, 8)  # product, step, high, t, low, block, g
    return split.permute(5, 1, 6, 3, 0, 2, 4).contiguous().to(torch.bfloat16)


def _pack_float32(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[block, step, q, t, column, product, 4]``, see ``fragments.cuh``."""
    products, rows, columns = weight.shape
    # k = 16 step + 8 high + 2 q + low, n = 8 block + 2 t + column
    split = weight.view(products, rows // STEP, 2, 4, 2, columns // 8, 4, 2)
    return split.permute(5, 1, 3, 6, 7, 0, 2, 4).contiguous()


def _pack_wgmma(weight: Tensor, round_steps: int, ahead: int) -> Tensor:
    """Return ``[products, K, N]`` as ``[block, step, product, warp, lane, 8]``, flat, see ``wgmma_layers.cuh``."""
    products, rows, columns = weight.shape
    rows, blocks = -(-rows // (STEP * round_steps)) * STEP * round_steps, -(-columns // 64)
    # k = 16 step + 8 high + 2 t + low, n = 64 block + 16 warp + 8 half + g
    split = _pad(weight, rows, 64 * blocks).view(products, rows // STEP, 2, 4, 2, blocks, 4, 2, 8)
    packed = split.permute(5, 1, 0, 6, 8, 3, 2, 7, 4).reshape(-1).to(torch.bfloat16)
    return _pad(packed, packed.numel() + ahead * products * 64 * STEP)


def _pack_factors(factors: Tensor) -> Tensor:
    """Return ``[J, N]`` as ``[step, half, four joints, channel, 4]``, see ``wgmma_layers.cuh``."""
    joints, channels = factors.shape
    fours = -(-joints // 4)
    split = _pad(factors, 4 * fours, channels).view(fours, 4, channels // STEP, 2, 8)
    return split.permute(2, 3, 0, 4, 1).contiguous()


def _pack_adjacency(adjacency: Tensor) -> Tensor:
    """Return ``[J, stride]`` with a row of each neighbour: what it weighs in all joints."""
    joints, stride = adjacency.shape
    return _pad(adjacency[:, :joints].T, joints, stride)


def _pack_cluster(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[block, step, product, lane, 8]``, see ``cluster_layers.cuh``."""
    products, rows, columns = weight.shape
    # k = 16 step + 8 high + 2 t + low, n = 16 block + 8 half + g
    split = weight.view(products, rows // STEP, 2, 4, 2, columns // STEP, 2, 8)
    return split.permute(5, 1, 0, 7, 3, 2, 6, 4).to(torch.bfloat16)


def _pack_by_channel(factors: Tensor) -> Tensor:
    """Return ``[J, N]`` as ``[N, J]``, see ``cluster_layers.cuh``."""
    return factors.T


def _pack_bias_by_channel(bias: Tensor, joints: int) -> Tensor:
    """Return ``[N]`` or ``[J, N]`` as ``[N, J]``."""
    return bias.expand(joints, -1).T
