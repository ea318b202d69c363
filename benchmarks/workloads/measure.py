"""Times: medians of many, by the device's own clock, over buffers that the caches do not hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def copies_needed(bytes_of_one: int, device: torch.device) -> int:
    """Return how many sets of buffers, used in turn, are three times the last cache: each then comes from memory."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, -(-3 * cache // max(bytes_of_one, 1))))


def milliseconds(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 1.0, most: int = 200, least: int = 5
) -> dict[str, float]:
    """Return median, quartiles and number of the times of calls taken in turn.

    Each time is of as many calls as take about two milliseconds, so that the gaps between launches and the clock's
    resolution do not count.

    Args:
        calls: Do the same on different buffers.
        device: Whose time it is.
        seconds: About how long it may take in all.
        most: Number of times at most.
        least: Number of times at least.
    """
    for call in calls:
        call()
    once = _time(calls[:1], device)
    batch = max(1, min(100, round(2.0 / max(once, 1e-3))))
    rounds = max(least, min(most, round(1e3 * seconds / (batch * max(once, 1e-3)))))
    turn, times = 0, []
    for _ in range(rounds):
        taken = [calls[(turn + i) % len(calls)] for i in range(batch)]
        turn += batch
        times.append(_time(taken, device) / batch)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"milliseconds": median, "quartile_1": low, "quartile_3": high, "times": rounds, "calls_a_time": batch}


def captured(calls: Sequence[Call]) -> Call | None:
    """Return the replay of a CUDA graph of all calls: kernels one after the other, whatever the host takes for each.

    None where they cannot be captured, as what copies from the host.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _time(calls: Sequence[Call], device: torch.device) -> float:
    """Return how many milliseconds some calls take together."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for call in calls:
            call()
        return 1e3 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kernel_microseconds(call: Call, times: int = 10) -> dict[str, float]:
    """Return the mean time of each kernel that a call runs on the GPU, by the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / times
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA  # and not the operators that launched them
    }


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device, *, tf32: bool = False) -> float:
    """Return the operations a second of torch's square product of random numbers."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        sets = [torch.randn(2, size, size, device=device).to(dtype) for _ in range(2)]
        calls = [lambda pair=pair: pair[0] @ pair[1] for pair in sets]
        return 2 * size**3 / (1e-3 * milliseconds(calls, device)["milliseconds"])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def copy_rate(num_bytes: int, device: torch.device) -> float:
    """Return the bytes read and written a second of a large copy on the device."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    time_of_one = milliseconds([lambda: target.copy_(source)], device)["milliseconds"]
    return 2 * source.numel() * 4 / (1e-3 * time_of_one)
