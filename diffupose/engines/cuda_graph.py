"""How a CUDA graph is captured here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

# PyTorch lets one capture be under way in a process.
_LOCK = threading.Lock()


def capture(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of what a function puts on a GPU.

    Args:
        work: What is captured; it has been called before, since kernels and libraries cannot be loaded now.
        device: The GPU, which is the current one.

    Raises:
        RuntimeError: If something in it cannot be captured, or memory runs out; the current stream is what it was.
    """
    current, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    with _LOCK:
        # cuBLAS keeps a workspace for each stream, and PyTorch's streams come round again: without this, graphs would
        # share one, that lies in the memory of the first and goes with it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # A stream of this GPU: the one that PyTorch would take is of the GPU that captured first. Other threads may
            # go on using the GPU meanwhile.
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            _clean_up(pool, current)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return graph


def _clean_up(pool: tuple[int, int], current: torch.cuda.Stream) -> None:
    """Undo what PyTorch leaves where a capture fails: its stream, an open pool, a generator that awaits the end."""
    torch.cuda.set_stream(current)
    # If it had not come so far there is nothing to end.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(current.device_index, pool)
    torch.cuda.synchronize(current.device)
    # A capture that succeeds closes the generator's.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(current.device)):
        torch.zeros(1, device=current.device)
