from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
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
def floor_rate() -> Callable[[bool], float | None]:
    """Return a function that measures the arithmetic floor, in bfloat16 or not, now."""
    return peak_rate


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
    if lines and (path := config.getoption("--ratios-json")):
        Path(path).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ratios-json", metavar="PATH", help="write the lines of 'side by side' as JSON, too")
    parser.addoption("--floors-json", metavar="PATH", help="write the rows of 'achieved over floor' as JSON, too")


def peak_rate(bfloat16: bool) -> float | None:
    """Return the operations a second of a loop that touches registers only, on all threads at once; None without it."""
    from diffupose.ops._backend import available_backends, cpp

    if not available_backends()["cpp"][0] or (bfloat16 and cpp().active_isa() != "avx512_bf16"):
        return None
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # the loop lets go of the interpreter
        return sum(pool.map(lambda _: cpp().peak_flops(bfloat16=bfloat16), range(threads)))


def _best_product() -> float:
    """Return the operations a second of torch's float32 product, the best of five: no floor may be below it."""
    size = 1024
    left, right = torch.randn(2, size, size).unbind(0)
    rates = []
    for _ in range(6):
        begin = time.perf_counter()
        left @ right
        rates.append(2 * size**3 / (time.perf_counter() - begin))
    return max(rates[1:])


def _write_floors(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print ratios, and what was achieved over the floor, of benchmarks that say how many operations they need."""
    session = getattr(config, "_benchmarksession", None)
    benches = [bench for bench in getattr(session, "benchmarks", ()) if bench and "floor_rate" in bench.extra_info]
    if not benches:
        return
    product = _best_product()
    groups: dict[str, dict[str, Any]] = {}
    for bench in benches:
        groups.setdefault(bench.group, {})[bench.extra_info["variant"]] = bench
    rows = []
    for group, variants in groups.items():
        for name, bench in variants.items():
            median, info = bench.stats.median, bench.extra_info
            row = {"case": group, "variant": name, "milliseconds": 1e3 * median, "flops": info["flops"]}
            for peer in ("eager", "compile"):
                if peer in variants:
                    row[f"times_{peer}"] = variants[peer].stats.median / median
            if info["floor_rate"] is not None:
                row |= {
                    "floor_gflops": info["floor_rate"] / 1e9,
                    "over_floor": info["flops"] / info["floor_rate"] / median,
                }
                row["void"] = info["floor_rate"] < product
            rows.append(row)
    terminalreporter.section("achieved over floor")
    terminalreporter.write_line(f"best torch.mm {product / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    for row in rows:
        text = f"{row['case']:<44} {row['variant']:<9} {row['milliseconds']:10.2f} ms"
        text += "".join(
            f" {row[f'times_{peer}']:6.2f} x {peer}" for peer in ("eager", "compile") if f"times_{peer}" in row
        )
        if "over_floor" in row:
            text += f" {100 * row['over_floor']:5.1f} % of {row['floor_gflops']:.0f} GFLOP/s"
            text += " VOID: slower than a product (is the machine busy?)" if row["void"] else ""
        terminalreporter.write_line(text)
    if path := config.getoption("--floors-json"):
        content = {
            "torch_mm_gflops": product / 1e9,
            **{key: benches[0].extra_info[key] for key in ("diffupose", "torch", "threads", "cpu", "cpu_capability")},
            "rows": rows,
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
