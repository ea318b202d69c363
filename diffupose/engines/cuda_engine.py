"""The whole denoiser and the whole reverse process on a GPU: what the CUDA engine runs."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from diffupose.engines.cpp_engine import PackedDenoiser, Precision, check_shapes
from diffupose.engines.cuda_graph import capture
from diffupose.engines.cuda_plan import STEP, Layout, pack_program, steps_of, unfit
from diffupose.engines.layer_program import LayerProgram, check_buffers
from diffupose.ops._backend import Backend, cuda, on_device, stream_of
from diffupose.schedule import StepTable

Mode = Literal["layers", "persistent", "cluster"]
"""``"layers"``: a kernel for each layer, captured in a CUDA graph, many blocks to a layer.
``"persistent"``: one kernel, a block takes eight hypotheses through all layers and steps: for many.
``"cluster"``: one kernel, eight blocks that write into each other's shared memory take one hypothesis through all
layers and steps: for few, on GPUs that have clusters."""

# The crossovers below were measured on an H200 (PyTorch 2.11, CUDA 13.0, bfloat16, `paper` at width 384, ten steps):
# `benchmarks/results/h200/`.

PERSISTENT_FROM = 384
"""Hypotheses from which the persistent kernel is taken: by layers 2.35 ms at 256 hypotheses and 4.25 ms at 512;
persistent 3.3 ms, a tenth of a hundred steps, at any number up to 1,056, which are eight to each multiprocessor."""

CLUSTER_ROUNDS = 1
"""Rounds of clusters that are taken, each of as many hypotheses as there are clusters at the same time: 10 hypotheses
take 0.43 ms, by layers 0.69 ms; 16, which are two rounds, 0.84 ms, and 0.68 ms by layers."""

_MOST_KEPT = 8  # graphs, and tables of steps, of those used last
_MOST_CAPTURED = 1024
"""Hypotheses up to which graphs are made: beyond, a layer takes longer than its launch, and a graph would only hold
memory. Not measured."""


class CudaDenoiser(PackedDenoiser):
    """A denoiser whose weights lie as the CUDA engine reads them.

    Args:
        program: The layers.
        precision: ``"float32"``, or ``"bfloat16"`` for the products, by tensor cores, and the activations; sums, and
            everything around the layers, are float32.
        device: The GPU.
        mode: How samples are drawn; None chooses by their number, see ``PERSISTENT_FROM`` and ``CLUSTER_ROUNDS``.

    Raises:
        BackendUnavailableError: If there is no CUDA extension or no GPU.
        ValueError: If the precision or the mode is unknown or does not fit, or the engine cannot run the program.
    """

    backend: Backend = "cuda"

    def __init__(
        self,
        program: LayerProgram,
        precision: Precision = "float32",
        device: torch.device | str = "cuda",
        mode: Mode | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        if mode is not None and mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))} or None, got {mode!r}")
        extension = cuda()
        for layer in program.layers:
            check_shapes(layer, program.num_joints)
        check_buffers(program)
        reason = unfit(program, extension.MAX_JOINTS)
        if reason is not None:
            raise ValueError(f"program does not fit: {reason}")
        self.program, self.precision, self.device = program, precision, torch.device(device)
        bfloat16 = precision == "bfloat16"
        self._engine = self._persistent_engine = _Engine(program, bfloat16, "pairs", self.device, extension)
        self._offsets = list(self._engine.packed.slots)
        self.device = self._engine.records.device  # with its number
        with on_device(self._engine.records):
            self._multiprocessors, most_bytes = extension.multiprocessors(), extension.shared_bytes()
            hopper = bfloat16 and program.num_joints <= extension.WGMMA_MAX_JOINTS and extension.wgmma_available()
        if hopper:  # whose kernel wants everything laid out in another way
            self._persistent_engine = _Engine(program, bfloat16, "wgmma", self.device, extension)
        self._cluster_engine: _Engine | None = None
        self._num_clusters = 0  # that run at the same time
        why_not_cluster: str | None = "it takes bfloat16 only"
        if bfloat16 and mode in ("cluster", None):
            why_not_cluster = self._pack_for_clusters(extension)
        if mode == "cluster" and why_not_cluster is not None:
            raise ValueError(f"mode cannot be cluster here: {why_not_cluster}")
        tile_bytes = self._persistent_engine.packed.tile_bytes
        self._why_not_persistent = (
            "it takes bfloat16 only"
            if not bfloat16
            else None
            if tile_bytes <= most_bytes
            else f"a tile takes {tile_bytes} bytes of shared memory, a block of this GPU has fewer"
        )
        if mode == "persistent" and self._why_not_persistent is not None:
            raise ValueError(f"mode cannot be persistent here: {self._why_not_persistent}")
        self.mode = mode
        self._tile_poses = extension.TILE_POSES
        self._table: tuple[bytes, Tensor] | None = None
        self._graphs: OrderedDict[object, _Captured | None] = OrderedDict()  # None: seen once
        self._steps: OrderedDict[object, _Steps] = OrderedDict()
        self._lock = threading.Lock()
        self._wait_for_copies()
        self._by_mode: dict[Mode, CudaDenoiser] = {}

    def _pack_for_clusters(self, extension: ModuleType) -> str | None:
        """Get ready for clusters, or return why they cannot be used."""
        with on_device(self._engine.records):
            if extension.clusters_available(self.program.num_joints, 0) == 0:
                return "the GPU has no clusters of blocks"
            engine = _Engine(self.program, True, "cluster", self.device, extension)
            needed = extension.cluster_bytes(engine.packed.tile_bytes, engine.packed.num_layers)
            self._num_clusters = extension.clusters_available(self.program.num_joints, needed)
        if self._num_clusters == 0:
            return f"the GPU has no clusters of blocks with {needed} bytes of shared memory"
        self._cluster_engine = engine
        return None

    @property
    def name(self) -> str:
        """What ran, for people."""
        return f"cuda {self.mode}" if self.mode else "cuda"

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights, in all layouts that are used."""
        engines = (self._engine, self._persistent_engine, self._cluster_engine)
        tensors = {id(t): t for engine in engines if engine is not None for t in engine.packed.tensors}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def tile_bytes(self) -> int:
        """Memory of the activations of eight poses by layers."""
        return self._engine.packed.tile_bytes

    def for_hypotheses(self, count: int) -> CudaDenoiser:
        """Return this denoiser with the mode that is best for so many hypotheses, unless one is chosen already."""
        mode = self._mode_for(count)
        if self.mode is not None:
            return self
        if mode not in self._by_mode:  # kept, with what it tabulates
            chosen = copy.copy(self)
            chosen.mode = mode
            self._by_mode[mode] = chosen
        return self._by_mode[mode]

    @property
    def max_hypotheses(self) -> int:
        """How many hypotheses to take at once: layers have a workspace that grows with them."""
        return 1 << 17 if self.mode in ("persistent", "cluster") else 1 << 12

    def _mode_for(self, count: int) -> Mode:
        if self.mode is not None:
            return self.mode
        if self._why_not_persistent is None and count >= PERSISTENT_FROM:
            return "persistent"
        fits = self._cluster_engine is not None and count <= CLUSTER_ROUNDS * self._num_clusters
        return "cluster" if fits else "layers"

    def _engine_for(self, mode: Mode) -> tuple[_Engine, int]:
        """Return what runs in a mode, and on how many blocks or clusters; 0 for layers."""
        if mode == "cluster":
            assert self._cluster_engine is not None
            return self._cluster_engine, self._num_clusters
        if mode == "persistent":
            return self._persistent_engine, self._multiprocessors
        return self._engine, 0

    def _padded(self, channels: int) -> int:
        return STEP * steps_of(channels)

    def _num_parameters(self) -> int:
        return self._engine.packed.num_parameters

    def _place(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, torch.float32).contiguous()

    def parameters(self, timesteps: Tensor) -> Tensor:
        """Return the scales and shifts of all steps, ``[S, ...]``, as the engine reads them; the last ones are kept."""
        table = super().parameters(timesteps)
        if table.is_cuda:  # another thread may replace it while this stream still reads it
            table.record_stream(torch.cuda.current_stream(table.device))
        return table

    def _workspace(self, poses: int) -> Tensor:
        tiles = -(-poses // self._tile_poses)
        return torch.empty(tiles * self.tile_bytes, dtype=torch.uint8, device=self.device)

    def _wait_for_copies(self) -> None:
        """Wait for what was copied from the host: the next call may come on another stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _denoise(self, sample: Tensor, condition: Tensor, parameters: Tensor, out: Tensor) -> None:
        workspace = self._workspace(len(sample))
        with on_device(out):
            self._engine.handle.denoise(
                sample=sample.data_ptr(), condition=condition.data_ptr(), parameters=parameters.data_ptr(),
                num_poses=len(sample), workspace=workspace.data_ptr(), out=out.data_ptr(), stream=stream_of(out),
            )  # fmt: skip

    def sample(
        self,
        inputs: Tensor,
        table: StepTable,
        seed: int,
        frame_ids: Tensor,
        hypothesis_ids: Tensor,
        clip_sample_range: float | None,
    ) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``diffupose.ops.sample``, which checks the arguments."""
        count = len(frame_ids) * len(hypothesis_ids)
        if count == 0:
            shape = (len(frame_ids), len(hypothesis_ids), inputs.shape[1], 3)
            return torch.empty(shape, dtype=torch.float32, device=self.device)
        mode = self._mode_for(count)
        with on_device(self._engine.records):
            # Filled on the device: nothing is copied from the host once a table of steps is known, so that a caller can
            # capture the call.
            capturing = inputs.is_cuda and torch.cuda.is_current_stream_capturing()
            seeds = torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, device=self.device)
            given = (self._place(inputs), frame_ids.contiguous(), hypothesis_ids.contiguous(), seeds)
            steps_key, steps = self._steps_of(table, capturing)

            def build(static: tuple[Tensor, ...]) -> _Run:
                return _Run(self, static, steps.used_on_this_stream(), clip_sample_range, mode)

            if mode != "layers" or not given[0].is_cuda or count > _MOST_CAPTURED or capturing:
                return build(given)()
            key = (
                inputs.shape, len(hypothesis_ids), steps_key, clip_sample_range, stream_of(given[0])
            )  # fmt: skip
            # A graph has its own memory: whoever replays it must have its inputs in there, and the result out again.
            with self._lock:
                seen = key in self._graphs
                captured = self._graphs.pop(key, None)
                if captured is None and seen:
                    # No memory, say, or another capture in the way; another time it may work.
                    with contextlib.suppress(RuntimeError):
                        captured = _Captured(build, given)
                self._graphs[key] = captured
                if len(self._graphs) > _MOST_KEPT:
                    self._graphs.popitem(last=False)
                # The first call of a shape, which may be the only one, also loads the kernels: a capture cannot.
                return build(given)() if captured is None else captured(given)

    def _steps_of(self, table: StepTable, capturing: bool) -> tuple[object, _Steps]:
        """Return a table of steps on the device, and what tells it from others."""
        scale = None if table.noise_scale is None else table.noise_scale.tobytes()
        key = (table.coefficients.tobytes(), table.timesteps.tobytes(), scale)
        with self._lock:
            if capturing and key not in self._steps:
                # It would have to be copied from the host, which nobody can capture.
                raise RuntimeError("a step table must be used once before a CUDA graph captures it, this one is new")
            steps = self._steps.pop(key, None) or _Steps(self, table)
            self._steps[key] = steps
            steps.captured |= capturing
            old = [key for key, steps in self._steps.items() if not steps.captured][:-_MOST_KEPT]
            for name in old:
                del self._steps[name]
        return key, steps


class _Engine:
    """A packed program, and what the extension runs it with."""

    def __init__(
        self, program: LayerProgram, bfloat16: bool, layout: Layout, device: torch.device, extension: ModuleType
    ) -> None:
        self.packed = packed = pack_program(program, bfloat16, device, extension, layout)
        self.records = torch.frombuffer(bytearray(packed.records), dtype=torch.uint8).to(device)
        self.handle = extension.CudaEngine(
            layers=packed.records, layers_cuda=self.records.data_ptr(), num_joints=program.num_joints,
            num_condition_channels=program.widths[0] - 3, num_output_channels=program.widths[-1], input=packed.input,
            output=packed.output, tile_bytes=packed.tile_bytes, bfloat16=bfloat16, layout=layout,
        )  # fmt: skip


class _Steps:
    """A table of steps where the engine reads it."""

    def __init__(self, denoiser: CudaDenoiser, table: StepTable) -> None:
        coefficients, scale = table.tensor(), table.noise_scale_tensor()
        self.count = len(table.timesteps)
        self.has_history = bool((coefficients[:, 4] != 0).any())
        self.captured = False  # a graph of the caller's reads it, for who knows how long
        # Ordinary tensors, whoever calls first.
        with torch.inference_mode(False), torch.no_grad():
            self.coefficients = denoiser._place(coefficients)
            self.noise_scale = None if scale is None else denoiser._place(scale)
            self.parameters = denoiser._place(denoiser.tabulate(torch.from_numpy(table.timesteps)))
        denoiser._wait_for_copies()

    def used_on_this_stream(self) -> _Steps:
        """Return the table, whose memory is not given to others before this stream has done what it has been told."""
        for tensor in (self.coefficients, self.noise_scale, self.parameters):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self


class _Run:
    """One call of the engine's sampler, with everything that it reads and writes."""

    def __init__(
        self,
        denoiser: CudaDenoiser,
        given: tuple[Tensor, ...],
        steps: _Steps,
        clip_sample_range: float | None,
        mode: Mode,
    ) -> None:
        inputs, frame_ids, hypothesis_ids, seeds = given
        shape = (len(frame_ids), len(hypothesis_ids), inputs.shape[1], 3)
        self.out = torch.empty(shape, dtype=torch.float32, device=inputs.device)
        poses = shape[0] * shape[1]
        self._engine, self._num_blocks = denoiser._engine_for(mode)
        self._num_steps = steps.count
        self._num_parameters = denoiser._num_parameters()
        self._clip = clip_sample_range
        self._tensors = {
            "condition": inputs,
            "coefficients": steps.coefficients,
            "noise_scale": steps.noise_scale,
            "parameters": steps.parameters,
            "seed": seeds,
            "frame_ids": frame_ids,
            "hypothesis_ids": hypothesis_ids,
            "x0_last": torch.empty_like(self.out) if steps.has_history else None,
            "out": self.out,
            "workspace": denoiser._workspace(poses) if mode == "layers" else None,
        }

    def __call__(self) -> Tensor:
        addresses = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in self._tensors.items()}
        self._engine.handle.sample(
            **addresses, num_parameters=self._num_parameters, clip=self._clip,
            num_frames=self.out.shape[0], num_hypotheses=self.out.shape[1], num_steps=self._num_steps,
            num_blocks=self._num_blocks, stream=stream_of(self.out),
        )  # fmt: skip
        return self.out


class _Captured:
    """A run as a CUDA graph."""

    def __init__(self, build: Callable[[tuple[Tensor, ...]], _Run], given: tuple[Tensor, ...]) -> None:
        # Ordinary tensors, which calls inside and outside of inference mode may write to.
        with torch.inference_mode(False), torch.no_grad():
            self._static = tuple(tensor.clone() for tensor in given)
            self._run = build(self._static)
        self._graph = capture(self._run, self._run.out.device)

    def __call__(self, given: tuple[Tensor, ...]) -> Tensor:
        for static, tensor in zip(self._static, given, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._run.out.clone()
