"""The tests of the Triton kernels, in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffupose.ops._backend import TRITON_IS_INTERPRETED


def reason_to_skip() -> str:
    """Return why the interpreter cannot be started here, or nothing."""
    if TRITON_IS_INTERPRETED:
        return "this is the interpreter"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    old = [int(part) for part in triton.split(".")[:2]] < [3, 7]
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton} needs NumPy below 2.4, this is {np.__version__}"
    return ""


# A process of its own runs every fourth file.
OTHERS = {Path(__file__).name, "test_ahead_of_time.py"}
FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path.name not in OTHERS)
PARTS = 4


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(pytestconfig, which, part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which]
    command += map(str, FILES[part::PARTS])
    result = subprocess.run(
        command, cwd=pytestconfig.rootpath, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    print(result.stdout[-200:])
    none_is_slow = which == "slow" and result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert result.returncode == 0 or none_is_slow, result.stdout + result.stderr
    assert " passed" in result.stdout or none_is_slow
