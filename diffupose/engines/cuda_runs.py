"""What the CUDA engine holds on a GPU: packed programs, tables of steps, and calls captured as graphs."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from diffupose.engines.cuda_graph import capture
from diffupose.engines.cuda_layouts import LayoutName
from diffupose.engines.cuda_plan import pack_program
from diffupose.engines.engine import Precision, addresses_of
from diffupose.engines.layer_program import LayerProgram
from diffupose.ops._backend import stream_of
from diffupose.schedule import StepTable

_MOST_KEPT = 8  # graphs, and tables of steps, of those used last


class HeldProgram:
    """A program packed in one layout, and what the extension runs it with."""

    def __init__(
        self,
        program: LayerProgram,
        precision: Precision,
        layout: LayoutName,
        device: torch.device,
        extension: ModuleType,
    ) -> None:
        self.program, self.precision, self.extension = program, precision, extension
        bfloat16 = precision == "bfloat16"
        self.packed = packed = pack_program(program, bfloat16, device, extension, layout)
        self.records = torch.frombuffer(bytearray(packed.records), dtype=torch.uint8).to(device)
        self.handle = extension.CudaEngine(
            layers=packed.records, layers_cuda=self.records.data_ptr(), num_joints=program.num_joints,
            num_condition_channels=program.widths[0] - 3, num_output_channels=program.widths[-1], input=packed.input,
            output=packed.output, tile_bytes=packed.tile_bytes, bfloat16=bfloat16, layout=layout,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """The GPU, with its number."""
        return self.records.device

    def in_layout(self, layout: LayoutName) -> HeldProgram:
        """Return the same program in another layout."""
        return HeldProgram(self.program, self.precision, layout, self.device, self.extension)

    def workspace(self, poses: int) -> Tensor:
        """Return memory for the activations of some poses, which are run by layers."""
        tiles = -(-poses // self.extension.TILE_POSES)
        return torch.empty(tiles * self.packed.tile_bytes, dtype=torch.uint8, device=self.device)


class StepsOnDevice:
    """A table of steps where the engine reads it; ``place`` brings a tensor there."""

    def __init__(self, table: StepTable, parameters: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        coefficients, scale = table.tensor(), table.noise_scale_tensor()
        self.has_history = bool((coefficients[:, 4] != 0).any())
        self.captured = False  # whether a graph of the caller's reads it, for who knows how long
        # Ordinary tensors, whoever calls first.
        with torch.inference_mode(False), torch.no_grad():
            self.coefficients = place(coefficients)
            self.noise_scale = None if scale is None else place(scale)
            self.parameters = place(parameters)
        wait_for_copies(self.coefficients.device)

    def used_on_this_stream(self) -> StepsOnDevice:
        """Return the table; its memory is not given away before this stream has done what it has been told so far."""
        for tensor in (self.coefficients, self.noise_scale, self.parameters):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self


class StepTables:
    """The tables of steps that were used last, and those that a graph of the caller's reads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, StepsOnDevice] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, table: StepTable, capturing: bool, make: Callable[[StepTable], StepsOnDevice]
    ) -> tuple[object, StepsOnDevice]:
        """Return what tells a table from others, and the table on the device.

        Raises:
            RuntimeError: If a table is new while a graph is captured: nobody can capture its copies from the host.
        """
        scale = None if table.noise_scale is None else table.noise_scale.tobytes()
        key = (table.coefficients.tobytes(), table.timesteps.tobytes(), scale)
        with self._lock:
            if capturing and key not in self._kept:
                raise RuntimeError("a step table must be used once before a CUDA graph captures it, this one is new")
            steps = self._kept.pop(key, None) or make(table)
            self._kept[key] = steps
            steps.captured |= capturing
            for old in [key for key, steps in self._kept.items() if not steps.captured][:-_MOST_KEPT]:
                del self._kept[old]
        return key, steps


Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a call brings: condition ``[B, J, C]``, frame ids ``[B]``, hypothesis ids ``[H]`` and seed ``[1]``."""


class Run:
    """One call of the engine's sampler, with everything that it reads and writes.

    Args:
        held: What is run.
        num_blocks: Thread blocks or clusters of the one kernel; 0 for a kernel a layer.
        given: What the call brings, on the device.
        steps: The table of steps.
        clip_sample_range: Limit of x0.
    """

    def __init__(
        self,
        held: HeldProgram,
        num_blocks: int,
        given: Given,
        steps: StepsOnDevice,
        clip_sample_range: float | None,
    ) -> None:
        condition, frame_ids, hypothesis_ids, seed = given
        shape = (len(frame_ids), len(hypothesis_ids), condition.shape[1], 3)
        self.out = torch.empty(shape, dtype=torch.float32, device=condition.device)
        self._handle = held.handle
        self._tensors = {
            "condition": condition,
            "coefficients": steps.coefficients,
            "noise_scale": steps.noise_scale,
            "parameters": steps.parameters,
            "seed": seed,
            "frame_ids": frame_ids,
            "hypothesis_ids": hypothesis_ids,
            "x0_last": torch.empty_like(self.out) if steps.has_history else None,
            "out": self.out,
            "workspace": None if num_blocks else held.workspace(shape[0] * shape[1]),
        }
        self._numbers = {
            "num_parameters": steps.parameters.shape[1], "clip": clip_sample_range, "num_frames": shape[0],
            "num_hypotheses": shape[1], "num_steps": len(steps.coefficients), "num_blocks": num_blocks,
        }  # fmt: skip

    def __call__(self) -> Tensor:
        """Put the kernels on the current stream and return the samples."""
        self._handle.sample(**addresses_of(self._tensors), **self._numbers, stream=stream_of(self.out))
        return self.out


class _CapturedRun:
    """A run as a CUDA graph. It has its own memory: inputs are copied into it, and the result out of it."""

    def __init__(self, build: Callable[[Given], Run], given: Given) -> None:
        # Ordinary tensors, which calls inside and outside of inference mode may write to.
        with torch.inference_mode(False), torch.no_grad():
            condition, frame_ids, hypothesis_ids, seed = (tensor.clone() for tensor in given)
            self._static = (condition, frame_ids, hypothesis_ids, seed)
            self._run = build(self._static)
        self._graph = capture(self._run, self._run.out.device)

    def __call__(self, given: Given) -> Tensor:
        for static, tensor in zip(self._static, given, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._run.out.clone()


class CapturedRuns:
    """Runs as graphs, of the shapes that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, _CapturedRun | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()

    def run(self, key: object, build: Callable[[Given], Run], given: Given) -> Tensor:
        """Return samples; the first call of a key also loads the kernels, which a capture cannot, the second captures.

        Only one thread at a time may write a graph's inputs and read its result.
        """
        with self._lock:
            seen = key in self._kept
            captured = self._kept.pop(key, None)
            if captured is None and seen:
                # No memory, say, or another capture in the way; another time it may work.
                with contextlib.suppress(RuntimeError):
                    captured = _CapturedRun(build, given)
            self._kept[key] = captured
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return build(given)() if captured is None else captured(given)


def wait_for_copies(device: torch.device) -> None:
    """Wait for what was copied from the host: the next call may come on another stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
