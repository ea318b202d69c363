"""The reverse process step by step on the device: a network, and the Triton step, replayed as a CUDA graph.

Whatever changes from step to step lies in buffers: the row of the step table is read by a step tensor that the loop's
body counts up. So one step is one graph, whatever the sampler, and the host waits for nothing.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from diffupose.engines import cuda_graph
from diffupose.engines.engine import SampleRequest
from diffupose.ops._backend import TRITON_IS_INTERPRETED
from diffupose.ops.philox_normal import signed
from diffupose.schedule import StepTable

# Beyond, kernels take longer than their launches, and a graph would only hold memory. Not measured.
_MOST_ROWS = 1024
# Graphs that are kept for a network: each holds the memory of its activations.
_MOST_LOOPS = 8

_LOOPS: weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple[object, ...], _Loop]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class _Loop:
    """The buffers of one shape, and its graph once there is one."""

    def __init__(self, request: SampleRequest) -> None:
        condition, table = request.condition, request.table
        (batch, hypotheses, joints, _), steps = request.shape, table.num_inference_steps
        long = partial(torch.empty, dtype=torch.int64, device=condition.device)
        single = partial(torch.empty, dtype=torch.float32, device=condition.device)
        self.rows = condition.new_empty(batch * hypotheses, joints, condition.shape[2])
        self.x = condition.new_empty(request.shape)
        multistep, self.draws = _traits(table)
        self.x0 = torch.empty_like(self.x) if multistep else None
        self.coefficients = single(steps, 6)
        self.scale = None if table.noise_scale is None else single(steps, joints, 3)
        self.timesteps, self.step, self.seed = long(steps), long(1), long(1)
        self.frame_ids, self.hypothesis_ids = long(batch), long(hypotheses)
        self.clip = request.clip_sample_range
        self.table: bytes | None = None  # what the buffers hold
        self.used = False
        self.replay: Callable[[], None] | None = None
        self.captures = True
        self.lock = threading.Lock()

    def load(self, request: SampleRequest, noise: Tensor) -> None:
        """Fill the buffers for the first step."""
        table = request.table
        content = _content(table)
        if content != self.table:  # copies from the host are worth avoiding
            self.coefficients.copy_(table.tensor())
            self.timesteps.copy_(torch.from_numpy(table.timesteps))
            scale = table.noise_scale_tensor()
            if self.scale is not None and scale is not None:
                self.scale.copy_(scale)
            self.table = content
        self.rows.unflatten(0, self.x.shape[:2]).copy_(request.condition.unsqueeze(1))
        self.x.copy_(noise)
        self.seed.fill_(signed(request.seed))
        self.frame_ids.copy_(request.frame_ids)
        self.hypothesis_ids.copy_(request.hypothesis_ids)
        self.step.zero_()

    def advance(self, denoiser: nn.Module) -> None:
        """Take one step: the body of the loop, which a graph replays."""
        from diffupose.kernels.reverse_step import DrawnNoise, TableRow, reverse_step

        timestep = self.timesteps.index_select(0, self.step)  # [1]
        output = denoiser(self.x.flatten(0, 1), self.rows, timestep).unflatten(0, self.x.shape[:2])
        row = TableRow(self.coefficients, self.step, self.scale)
        noise = DrawnNoise(self.seed, self.frame_ids, self.hypothesis_ids) if self.draws else None
        reverse_step(self.x, output, row, self.x0, noise, self.clip, out=(self.x, self.x0))
        self.step += 1

    def capture(self, denoiser: nn.Module) -> None:
        """Make the graph of one step, if the network's code can be captured; the buffers are overwritten."""
        self.step.zero_()
        try:
            self.replay = _capture(lambda: self.advance(denoiser), self.x.device)
        except torch.cuda.OutOfMemoryError:
            pass  # another time there may be room
        except RuntimeError as error:
            self.captures = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"diffupose: this network runs without a CUDA graph, slower: {reason}", stacklevel=2)


def _capture(advance: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return what replays a function's work on the GPU."""
    current, other = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    other.wait_stream(current)
    with torch.cuda.stream(other):  # libraries prepare themselves in their first call, which must not be captured
        advance()
    current.wait_stream(other)
    return cuda_graph.capture(advance, device).replay


def sample(denoiser: nn.Module, request: SampleRequest, noise: Tensor) -> Tensor:
    """Return samples ``[B, H, J, 3]``; see ``diffupose.ops.sample``, which checks the arguments.

    The first call of a shape runs step by step, which also prepares the kernels; the second one captures a step, and
    from then on it is replayed. Graphs are kept per network and given up when its tensors move, when modules are
    replaced, or when many shapes come. What else Python code may depend on, an attribute say, is what it was at the
    capture. A network that cannot be captured, and every other device than a GPU, runs the same loop step by step.

    Args:
        denoiser: The network.
        request: What to sample.
        noise: What the process starts from, ``[B, H, J, 3]``.
    """
    device = request.condition.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Buffers of inference mode cannot be written outside of it.
        with torch.inference_mode():
            loop, kept = _loop_of(denoiser, request)
        with loop.lock:
            with torch.inference_mode():
                if kept and loop.used and loop.captures and loop.replay is None:
                    loop.capture(denoiser)
                loop.load(request, noise)
                for _ in range(request.table.num_inference_steps):
                    if loop.replay is None:
                        loop.advance(denoiser)
                    else:
                        loop.replay()
                loop.used = True
            return loop.x.clone()  # made in the caller's mode


def _traits(table: StepTable) -> tuple[bool, bool]:
    """Return whether a row needs the last x0, and whether one draws noise."""
    return bool((table.coefficients[:, 4] != 0).any()), bool((table.coefficients[:, 5] != 0).any())


def _content(table: StepTable) -> bytes:
    arrays = (table.coefficients, table.timesteps, table.noise_scale)
    return b"".join(array.tobytes() for array in arrays if array is not None)


def _loop_of(denoiser: nn.Module, request: SampleRequest) -> tuple[_Loop, bool]:
    """Return a loop for a request, and whether it is one that is kept."""
    if not _is_kept(denoiser, request):
        return _Loop(request), False
    condition, table, network = request.condition, request.table, _code_of(denoiser)
    # A graph runs in the order of one stream.
    stream = torch.cuda.current_stream(condition.device).cuda_stream if condition.is_cuda else 0
    sizes = (*request.shape, condition.shape[2], table.num_inference_steps)
    settings = (*_traits(table), table.noise_scale is None, request.clip_sample_range)
    key = (network, sizes, condition.dtype, condition.device, settings, stream)
    with _LOCK:
        loops = _LOOPS.setdefault(denoiser, OrderedDict())
        for old in [old for old in loops if old[0] != network]:
            del loops[old]
        if key not in loops:
            loops[key] = _Loop(request)
        loops.move_to_end(key)
        while len(loops) > _MOST_LOOPS:
            loops.popitem(last=False)
        return loops[key], True


def _code_of(denoiser: nn.Module) -> tuple[object, ...]:
    """Return what the kernels of a network's call depend on, as far as it can be seen from outside."""
    tensors = ((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in _tensors_of(denoiser))
    modules = ((id(module), id(vars(module).get("forward"))) for module in denoiser.modules())
    return (*tensors, *modules, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)


def _tensors_of(denoiser: nn.Module) -> Iterator[Tensor]:
    yield from denoiser.parameters()
    yield from denoiser.buffers()


def _is_kept(denoiser: nn.Module, request: SampleRequest) -> bool:
    """Return whether a graph can be made, does what the network's code does, and is worth its memory."""
    return (
        request.condition.is_cuda
        and not TRITON_IS_INTERPRETED
        and 0 < request.shape[0] * request.shape[1] <= _MOST_ROWS
        and not any(module.training or _has_hooks(module) for module in denoiser.modules())
        # The copies of weights that autocast makes and keeps do not outlive it, a graph would.
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
