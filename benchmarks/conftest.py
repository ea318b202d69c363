"""The rows of the benchmarks, how one is timed, and the table that a run ends with.

A benchmark module has ``cases(device, size)``, whose variants are its rows, and ``is_default(case, variant)``: the rest
comes by ``--all-rows``. With ``--benchmark-disable`` every row but the compiled ones runs once, at tiny sizes.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import diffupose
from benchmarks.workloads.case import Case
from benchmarks.workloads.measure import matmul_rate
from benchmarks.workloads.table import HEADER, aligned, times
from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import available_backends, cpp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.5  # about as long as a row is timed, but for three rounds at least
_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-rows", action="store_true", help="time all rows of the benchmarks, not only the default")
    parser.addoption("--floors-json", metavar="PATH", help="write the rows of the closing table as JSON, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" not in metafunc.fixturenames:
        return
    module, config = metafunc.module, metafunc.config
    once, every = config.getoption("benchmark_disable"), config.getoption("all_rows")
    rows, left_out = [], 0
    for case in module.cases(DEVICE, "tiny" if once else "cpu"):
        for variant in case.variants:
            chosen = not variant.startswith("compile") if once else every or module.is_default(case.name, variant)
            left_out += not chosen
            if chosen:
                rows.append(pytest.param(case, variant, id=f"{case.name}, {variant}"))
    config.stash[_LEFT_OUT] = config.stash.get(_LEFT_OUT, 0) + left_out
    metafunc.parametrize(("case", "variant"), rows)


@pytest.fixture
def time_row(benchmark) -> Callable[[Case, str], None]:
    """Return a function that times a variant of a case, if its result is right."""

    def run(case: Case, variant: str) -> None:
        benchmark.group = case.name
        torch._dynamo.reset()  # each compiled one has its own share of the recompilation limit
        try:
            calls = case.variants[variant]()
            error = case.error(variant, calls[0]())  # compilation and first-call costs come before the clock
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
        assert error <= case.limit(variant)
        turn = itertools.cycle(calls)

        def call() -> None:
            next(turn)()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        begin = time.perf_counter()
        call()
        once = time.perf_counter() - begin
        iterations = max(1, round(1e-3 / once))
        rounds = max(3, min(200, round(SECONDS / (once * iterations))))
        benchmark.extra_info.update(variant=variant, flops=case.flops)
        benchmark.pedantic(call, rounds=rounds, iterations=iterations)

    return run


def peak_rate(precision: str) -> float | None:
    """Return the operations a second of a loop that touches registers only, on all threads at once; None without it."""
    bfloat16 = precision == "bfloat16"
    if not available_backends()["cpp"][0] or (bfloat16 and cpp().active_isa() != "avx512_bf16"):
        return None
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # the loop lets go of the interpreter
        return sum(pool.map(lambda _: cpp().peak_flops(bfloat16=bfloat16), range(threads)))


@pytest.hookimpl(trylast=True)  # after the tables of pytest-benchmark, so that the run ends with the one that says most
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benches = [bench for bench in getattr(session, "benchmarks", ()) if bench and "flops" in bench.extra_info]
    if benches and not config.getoption("benchmark_disable"):
        _write_table(terminalreporter, config, benches)
    if config.stash.get(_LEFT_OUT, 0) and not config.getoption("benchmark_disable"):
        terminalreporter.write_line(f"{config.stash[_LEFT_OUT]} more rows are timed by --all-rows")


def _write_table(terminalreporter: pytest.TerminalReporter, config: pytest.Config, benches: list) -> None:
    """Print times, ratios to eager PyTorch, and what was achieved over the floor, where operations are the floor."""
    peaks = {precision: peak_rate(precision) for precision in ("float32", "bfloat16")}
    # No floor may be below a product of PyTorch's.
    product = matmul_rate(1024, torch.float32, torch.device("cpu"))
    rows = []
    for bench in benches:
        variant, flops, seconds = bench.extra_info["variant"], bench.extra_info["flops"], bench.stats.median
        row = {"case": bench.group, "variant": variant, "milliseconds": 1e3 * seconds, "flops": flops}
        peak = peaks["bfloat16" if "bf16" in variant else "float32"]
        rows.append(row | ({"of_product_rate": flops / peak / seconds} if flops and peak else {}))
    terminalreporter.section("times, beside eager PyTorch, and what was achieved over the floor")
    for line in aligned(HEADER, times(rows)):
        terminalreporter.write_line(line)
    shown = ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items() if peak)
    threads = torch.get_num_threads()
    terminalreporter.write_line(f"floor on {threads} threads: {shown or 'none'}; torch.mm {product / 1e9:.0f} GFLOP/s")
    if any(peak and peak < product for peak in peaks.values()):
        terminalreporter.write_line("VOID: a floor is slower than a product (is the machine busy?)")
    if path := config.getoption("--floors-json"):
        machine = {
            "diffupose": diffupose.__version__,
            "torch": torch.__version__,
            "threads": threads,
            "cpu": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        }
        content = {"torch_mm_flops": product, "peaks": peaks, **machine, "rows": rows}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
