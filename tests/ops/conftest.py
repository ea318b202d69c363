import pytest
import torch

from diffupose.ops._backend import available_backends, cpp

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
