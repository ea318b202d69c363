import pytest
import torch

from diffupose.testing import requires_cpp


@pytest.fixture
def with_cuda(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Make ``"cuda"`` a backend for tensors on ``device``: the real one, or on the CPU the emulated one."""
    if device.type == "cpu":
        request.getfixturevalue("emulated_cuda")


@pytest.fixture(params=[pytest.param("cpp", marks=requires_cpp), "cuda"])
def kernel_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend with compiled code, on the devices that it supports."""
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("C++ runs on the CPU")
    if request.param == "cuda":
        request.getfixturevalue("with_cuda")
    return request.param
