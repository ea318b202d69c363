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


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(_RATIOS, [])
    if lines:
        terminalreporter.section("side by side (medians; ratio: how many times as fast the last is as the first)")
        for line in lines:
            terminalreporter.write_line(line)
