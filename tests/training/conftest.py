from pathlib import Path

import pytest
from support.training_runs import write_mocap


@pytest.fixture(scope="session")
def mocap_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Motion capture of three made-up people, one of them to validate on."""
    return write_mocap(tmp_path_factory.mktemp("mocap") / "mocap.npz")
