import pytest
import torch


@pytest.fixture
def gpu(device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    """The device of the CUDA backend."""
    if device.type == "cpu":
        request.getfixturevalue("emulated_cuda")
    return device
