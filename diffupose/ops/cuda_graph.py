"""How a CUDA graph is captured here."""

from __future__ import annotations

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
    with _LOCK:
        # cuBLAS keeps a workspace for each stream, and PyTorch's streams come round again: without this, graphs would
        # share one, that lies in the memory of the first and goes with it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # A stream of this GPU: the one that PyTorch would take is of the GPU that captured first. Other threads may
            # go on using the GPU meanwhile.
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(current)  # PyTorch leaves its own where a capture fails
            torch._C._cuda_clearCublasWorkspaces()
    return graph
