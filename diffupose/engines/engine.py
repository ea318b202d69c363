"""The contract of the engines, and what those share that run a layer program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffupose.engines.layer_program import LayerProgram, ScaleShift, check_shape
from diffupose.errors import check_choice
from diffupose.ops._backend import Backend
from diffupose.schedule import StepTable

Precision = Literal["float32", "bfloat16"]
"""What the products of an engine are taken in; sums and everything else are float32."""


@dataclass(frozen=True)
class SampleRequest:
    """What an engine is to sample; tensors are on one device.

    Attributes:
        condition: ``[B, J, C]``.
        table: The sampler.
        seed: 64 bits.
        frame_ids: ``[B]`` int64.
        hypothesis_ids: ``[H]`` int64.
        clip_sample_range: Limit of x0 in data units, or None.
    """

    condition: Tensor
    table: StepTable
    seed: int
    frame_ids: Tensor
    hypothesis_ids: Tensor
    clip_sample_range: float | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, H, J, 3)``: of the samples."""
        return len(self.frame_ids), len(self.hypothesis_ids), self.condition.shape[1], 3


class Engine(ABC):
    """A network made ready to run the whole reverse process.

    Attributes:
        backend: What ``backend=`` calls it.
        precision: What products are taken in.
        max_hypotheses: How many hypotheses one call takes at most; None where memory grows with them, so that the
            caller has to set a limit.
    """

    backend: Backend
    precision: Precision = "float32"
    max_hypotheses: int | None = None

    @property
    def name(self) -> str:
        """What runs, for people."""
        return self.backend

    def for_hypotheses(self, count: int) -> Engine:
        """Return this engine as it is best for so many hypotheses in all."""
        return self

    def check(self, request: SampleRequest) -> None:  # noqa: B027 - most engines take whatever fits
        """Raise ValueError unless the engine can take a request; ``ops.sample`` has checked the rest."""

    @abstractmethod
    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output ``[N, J, 3 or more]``.

        Args:
            sample: x_t of shape ``[N, J, 3]``.
            condition: ``[N, J, C]``.
            timesteps: Integers of shape ``[1]``.
        """

    @abstractmethod
    def sample(self, request: SampleRequest) -> Tensor:
        """Return samples ``[B, H, J, 3]`` in data units; nothing is checked, see ``ops.sample``."""


class UnfitProgramError(ValueError):
    """An engine cannot run a layer program; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"program does not fit: {reason}")
        self.reason = reason


class ProgramEngine(Engine):
    """An engine of ours: its kernels read packed weights, made from a layer program.

    A step's parameters are one row: the scale of every slot, padded, and its shift behind it.
    """

    def __init__(self, program: LayerProgram, precision: Precision, padded: Callable[[int], int]) -> None:
        self.program, self.precision = program, precision
        self._slots = parameter_slots(program, padded)
        self._num_parameters = self._slots[-1][1] + padded(self._slots[-1][2]) if self._slots else 0
        self._table: tuple[bytes, Tensor] | None = None

    @abstractmethod
    def _place(self, value: Tensor) -> Tensor:
        """Return a tensor as the engine reads it: float32, contiguous, where the engine is."""

    @abstractmethod
    def _denoise(self, sample: Tensor, condition: Tensor, parameters: Tensor, out: Tensor) -> None:
        """Run the layers once, with one row of parameters."""

    def check(self, request: SampleRequest) -> None:
        """Raise ValueError unless the condition has the program's shape."""
        joints, channels = self.program.num_joints, self.program.widths[0] - 3
        if request.condition.shape[1:] != (joints, channels):
            raise ValueError(f"inputs must have shape [B, {joints}, {channels}], got {tuple(request.condition.shape)}")

    def parameters(self, timesteps: Tensor) -> Tensor:
        """Return the parameters of all steps, ``[S, ...]``, as the engine reads them; the last ones are kept."""
        timesteps = timesteps.to("cpu", torch.int64)
        key = timesteps.numpy().tobytes()
        kept = self._table
        if kept is None or kept[0] != key:
            # Replaced as one object: another thread sees the old or the new pair.
            self._table = kept = (key, self._place(self.tabulate(timesteps)))
        return kept[1]

    def tabulate(self, timesteps: Tensor) -> Tensor:
        """Return the parameters of all steps, ``[S, ...]``, on the CPU."""
        pairs = self.program.tabulate(timesteps)
        if len(pairs) != len(self._slots):
            raise ValueError(f"the program must tabulate {len(self._slots)} pairs, got {len(pairs)}")
        table = torch.zeros(len(timesteps), self._num_parameters, dtype=torch.float32)
        for (*begins, channels), pair in zip(self._slots, pairs, strict=True):
            for begin, values in zip(begins, pair, strict=True):
                check_shape("scale and shift", values, [len(timesteps), channels])
                table[:, begin : begin + channels] = values
        return table

    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output ``[N, J, C_out]``.

        Args:
            sample: x_t of shape ``[N, J, 3]``.
            condition: ``[N, J, C]``.
            timesteps: Integers of shape ``[1]`` or ``[N]``.

        Raises:
            ValueError: If a shape does not fit.
        """
        joints, channels = self.program.num_joints, self.program.widths[0] - 3
        if sample.ndim != 3 or sample.shape[1:] != (joints, 3):
            raise ValueError(f"sample must have shape [N, {joints}, 3], got {tuple(sample.shape)}")
        count = len(sample)
        if condition.shape != (count, joints, channels):
            raise ValueError(f"condition must have shape {[count, joints, channels]}, got {tuple(condition.shape)}")
        if timesteps.ndim != 1 or len(timesteps) not in (1, count):
            raise ValueError(f"timesteps must have shape [1] or [{count}], got {tuple(timesteps.shape)}")
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, got {timesteps.dtype}")
        sample, condition = self._place(sample), self._place(condition)
        out = sample.new_empty(count, joints, self.program.widths[-1])
        if len(timesteps) == 1:
            self._denoise(sample, condition, self.parameters(timesteps), out)
            return out
        for timestep in timesteps.unique():
            rows = torch.nonzero(timesteps == timestep).squeeze(1)
            part = sample.new_empty(len(rows), joints, self.program.widths[-1])
            self._denoise(sample[rows], condition[rows], self.parameters(timestep.view(1)), part)
            out[rows] = part
        return out


def parameter_slots(program: LayerProgram, padded: Callable[[int], int]) -> list[tuple[int, int, int]]:
    """Return for every slot where its scale and its shift begin in a step's parameters, and their channels."""
    slots, used = [], 0
    for layer in program.layers:
        if isinstance(layer, ScaleShift):
            slots.append((used, used + padded(layer.channels), layer.channels))
            used += 2 * padded(layer.channels)
    return slots


def addresses_of(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Return where tensors lie, 0 for None, by their names."""
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def check_precision(precision: str) -> None:
    """Raise ValueError unless this is a ``Precision``."""
    check_choice("precision", precision, get_args(Precision))
