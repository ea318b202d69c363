"""The CUDA engine: the whole denoiser, and the whole reverse process, on a GPU."""

from __future__ import annotations

import copy
from typing import get_args

import torch
from torch import Tensor

from diffupose.engines.cuda_modes import MOST_CAPTURED, Mode, find_ways
from diffupose.engines.cuda_plan import padded, unfit
from diffupose.engines.cuda_runs import (
    CapturedRuns,
    Given,
    HeldProgram,
    Run,
    StepsOnDevice,
    StepTables,
    wait_for_copies,
)
from diffupose.engines.engine import Precision, ProgramEngine, SampleRequest, UnfitProgramError, check_precision
from diffupose.engines.layer_program import LayerProgram
from diffupose.ops._backend import Backend, cuda, on_device, stream_of
from diffupose.ops.philox_normal import signed
from diffupose.schedule import StepTable


class CudaDenoiser(ProgramEngine):
    """A denoiser whose weights lie as the CUDA engine reads them.

    Args:
        program: The layers.
        precision: ``"float32"``, or ``"bfloat16"`` for the products, by tensor cores, and the activations; sums, and
            everything around the layers, are float32.
        device: The GPU.
        mode: How samples are drawn; None chooses by their number, see ``cuda_modes``.

    Raises:
        BackendUnavailableError: If there is no CUDA extension or no GPU.
        UnfitProgramError: If the engine cannot run the program.
        ValueError: If the precision or the mode is unknown, or the mode cannot run here.
    """

    backend: Backend = "cuda"

    def __init__(
        self,
        program: LayerProgram,
        precision: Precision = "float32",
        device: torch.device | str = "cuda",
        mode: Mode | None = None,
    ) -> None:
        check_precision(precision)
        if mode is not None and mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))} or None, got {mode!r}")
        extension = cuda()
        if (reason := unfit(program, extension.MAX_JOINTS)) is not None:
            raise UnfitProgramError(reason)
        super().__init__(program, precision, padded)
        self._held = HeldProgram(program, precision, "pairs", torch.device(device), extension)
        self.device, self.mode = self._held.device, mode
        self._ways = find_ways(self._held, mode)
        self._tables, self._captured = StepTables(), CapturedRuns()
        self._by_mode: dict[Mode, CudaDenoiser] = {}
        wait_for_copies(self.device)

    @property
    def name(self) -> str:
        """What runs, for people."""
        return f"cuda {self.mode}" if self.mode else "cuda"

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights, in all layouts that are used."""
        held = {self._held, *(way.held for way in self._ways.values())}
        return sum(tensor.numel() * tensor.element_size() for item in held for tensor in item.packed.tensors)

    @property
    def tile_bytes(self) -> int:
        """Memory of the activations of eight poses by layers."""
        return self._held.packed.tile_bytes

    @property
    def max_hypotheses(self) -> int:  # type: ignore[override]
        """How many hypotheses one call takes at most: by layers the workspace grows with them."""
        return 1 << 17 if self.mode in ("persistent", "cluster") else 1 << 12

    def for_hypotheses(self, count: int) -> CudaDenoiser:
        """Return this denoiser with the mode that is best for so many hypotheses, unless one is chosen already."""
        if self.mode is not None:
            return self
        mode = self._mode_for(count)
        if mode not in self._by_mode:  # kept, with what it tabulates
            chosen = copy.copy(self)
            chosen.mode, chosen._ways = mode, {mode: self._ways[mode]}
            self._by_mode[mode] = chosen
        return self._by_mode[mode]

    def _mode_for(self, count: int) -> Mode:
        return next(mode for mode, way in self._ways.items() if self.mode or way.least <= count <= way.most)

    def _place(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, torch.float32).contiguous()

    def parameters(self, timesteps: Tensor) -> Tensor:
        """Return the parameters of all steps, ``[S, ...]``, as the engine reads them; the last ones are kept."""
        table = super().parameters(timesteps)
        if table.is_cuda:  # another thread may replace it while this stream still reads it
            table.record_stream(torch.cuda.current_stream(table.device))
        return table

    def _denoise(self, sample: Tensor, condition: Tensor, parameters: Tensor, out: Tensor) -> None:
        workspace = self._held.workspace(len(sample))
        with on_device(out):
            self._held.handle.denoise(
                sample=sample.data_ptr(), condition=condition.data_ptr(), parameters=parameters.data_ptr(),
                num_poses=len(sample), workspace=workspace.data_ptr(), out=out.data_ptr(), stream=stream_of(out),
            )  # fmt: skip

    def sample(self, request: SampleRequest) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        count, table = request.shape[0] * request.shape[1], request.table
        if count == 0:
            return torch.empty(request.shape, dtype=torch.float32, device=self.device)
        mode = self._mode_for(count)
        way = self._ways[mode]
        with on_device(self._held.records):
            # Filled on the device: nothing is copied from the host once a table of steps is known, so that a caller can
            # capture the call.
            capturing = request.condition.is_cuda and torch.cuda.is_current_stream_capturing()
            seeds = torch.full((1,), signed(request.seed), device=self.device)
            ids = request.frame_ids.contiguous(), request.hypothesis_ids.contiguous()
            given = (self._place(request.condition), *ids, seeds)
            table_key, steps = self._tables.get(table, capturing, self._bring_steps)

            def build(tensors: Given) -> Run:
                return Run(way.held, way.num_blocks, tensors, steps.used_on_this_stream(), request.clip_sample_range)

            if mode != "layers" or not given[0].is_cuda or count > MOST_CAPTURED or capturing:
                return build(given)()
            shapes = request.condition.shape, request.shape[1]
            key = (*shapes, table_key, request.clip_sample_range, stream_of(given[0]))
            return self._captured.run(key, build, given)

    def _bring_steps(self, table: StepTable) -> StepsOnDevice:
        return StepsOnDevice(table, self.tabulate(torch.from_numpy(table.timesteps)), self._place)
