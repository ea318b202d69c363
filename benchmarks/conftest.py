from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import diffupose


@pytest.fixture
def timed(benchmark) -> Callable[..., Callable[[], Any]]:
    """Return a function that binds a call so that it runs in inference mode and ends when the GPU is done."""
    benchmark.extra_info.update(
        diffupose=diffupose.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=platform.processor() or platform.machine(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )

    def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
        call = partial(function, *args, **kwargs)

        def run() -> Any:
            with torch.inference_mode():
                result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

        run()  # compilation and first-call costs come before the clock
        return run

    return bind


_RATIOS = pytest.StashKey[list[str]]()


@pytest.fixture
def compare(request) -> Callable[..., float]:
    """Return a function that times calls in turn, round by round, and adds a line to the end of the report.

    What else runs on the machine then slows all of them alike: the ratio is worth more than the times.
    """

    def run(title: str, calls: dict[str, Callable[[], Any]], *, rounds: int) -> float:
        """Return how many times as fast the last call is as the first: the median over the rounds."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        first, *_, last = (values[1:] for values in times.values())  # the first round warms up
        ratio = statistics.median(a / b for a, b in zip(first, last, strict=True))
        shown = ", ".join(f"{name} {1e3 * statistics.median(values[1:]):.3g} ms" for name, values in times.items())
        request.config.stash.setdefault(_RATIOS, []).append(f"{title}: {shown}; ratio {ratio:.2f}")
        return ratio

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_RATIOS, [])
    if lines:
        terminalreporter.section("side by side (medians; ratio: how many times as fast the last is as the first)")
        for line in lines:
            terminalreporter.write_line(line)
    _write_floors(terminalreporter, config)


def peaks(num_threads: int) -> dict[bool, float]:
    """Return operations a second of all threads' cores by whether in bfloat16; empty where there is no extension."""
    from diffupose.ops._backend import available_backends, cpp

    if not available_backends()["cpp"][0]:
        return {}
    rates = {False: num_threads * cpp().peak_flops(bfloat16=False)}
    if cpp().active_isa() == "avx512_bf16":
        rates[True] = num_threads * cpp().peak_flops(bfloat16=True)
    return rates


def _write_floors(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print ratios, and what was achieved over the floor, of benchmarks that say how many operations they need."""
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", ()) if bench and "flops" in bench.extra_info]
    if not rows:
        return
    rates = peaks(torch.get_num_threads())
    # Whether the loop is what it claims to be: a product may come near it, never beyond.
    size = 1024
    left, right = torch.randn(2, size, size).unbind(0)
    best = max(2 * size**3 / _seconds(lambda: left @ right) for _ in range(5))
    write = terminalreporter.write_line
    terminalreporter.section("achieved over floor")
    write(
        f"best torch.mm {best / 1e9:.0f} GFLOP/s; "
        + ", ".join(f"floor {'bf16' if bf16 else 'fp32'} {rate / 1e9:.0f} GFLOP/s" for bf16, rate in rates.items())
    )
    if rates and rates[False] < best:
        write("VOID: the loop is slower than a product, so the floor below is none (is the machine busy?)")
    groups: dict[str, dict[str, Any]] = {}
    for bench in rows:
        groups.setdefault(bench.group, {})[bench.extra_info["variant"]] = bench
    for group, variants in groups.items():
        eager = variants.get("eager")
        for name, bench in variants.items():
            median = bench.stats.median
            rate = rates.get(bench.extra_info["bfloat16"])
            floor = "" if rate is None else f"{100 * bench.extra_info['flops'] / rate / median:5.1f} % of floor"
            ratio = "" if eager is None else f"{eager.stats.median / median:6.2f} x eager"
            bench.extra_info.update(flops_per_second=bench.extra_info["flops"] / median, floor_flops_per_second=rate)
            write(f"{group:<44} {name:<9} {1e3 * median:10.2f} ms {ratio} {floor}")


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
