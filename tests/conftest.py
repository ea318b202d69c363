import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.compiled import machine
from support.cuda_emulation import emulate

from diffupose.ops._backend import available_backends, cpp

# Those of this machine; without the extension one that the mark of the test skips.
ISAS = cpp().usable_isas() if available_backends()["cpp"][0] else ["no extension"]
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
WITHIN_A_TEST = "PYTEST_CURRENT_TEST" in os.environ
_left_out: set[str] = set()  # node ids of the tests that `-m` leaves out


def pytest_configure(config: pytest.Config) -> None:
    # Compiled code survives from run to run: tests that compile cost seconds instead of tens.
    cache = Path(config.rootpath) / ".pytest_cache" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    if IS_WORKER:
        # Processes that run side by side, and those that they start, have a core each.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_out.update(item.nodeid for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = sorted(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what ``make test`` leaves out, and how to run that."""
    if config.option.markexpr != "not slow" or not _left_out:
        return
    files = Counter(name.split("::")[0].removeprefix("tests/") for name in _left_out)
    terminalreporter.section("left out")
    for file, count in files.most_common():
        terminalreporter.line(f"{count:5} slow tests of {file}")
    terminalreporter.line(f"Run these {len(_left_out)} with `make test-slow`, all tests with `make test-all`.")


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    if WITHIN_A_TEST:  # which waits for this process
        yield
        return
    with machine(alone=request.node.get_closest_marker("alone") is not None):
        yield


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``"cuda"`` as a backend for tensors on the CPU: the same .cu files, every CUDA thread a fibre."""
    return emulate(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, and on a busy machine they lose a minute by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that runs here, in turn, as the one that the engine takes."""
    monkeypatch.setenv("DIFFUPOSE_ISA", request.param)
    return request.param


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed by test name, no TF32, and deterministic algorithms, which also fill fresh memory with NaN."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
