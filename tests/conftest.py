import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.cuda_emulation import emulate


def pytest_configure(config: pytest.Config) -> None:
    # Compiled code survives from run to run: tests that compile cost seconds instead of tens.
    cache = Path(config.rootpath) / ".pytest_cache" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


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
