import pytest
import torch

from diffupose.ops._backend import available_backends, cpp
from diffupose.testing import requires_cpp

# Those of this machine; without the extension one that the mark of the test skips.
ISAS = cpp().usable_isas() if available_backends()["cpp"][0] else ["no extension"]


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


@pytest.fixture
def with_cuda(request: pytest.FixtureRequest, device: torch.device) -> None:
    """``"cuda"`` is a backend for tensors on ``device``: the real one, or on the CPU the emulated one."""
    if device.type == "cpu":
        request.getfixturevalue("emulated_cuda")


@pytest.fixture(params=[pytest.param("cpp", marks=requires_cpp), "cuda"])
def kernel_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend that has code of its own, on the devices it has it for."""
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("C++ runs on the CPU")
    if request.param == "cuda":
        request.getfixturevalue("with_cuda")
    return request.param
