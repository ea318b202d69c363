"""The tests of the Triton kernels, in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffupose.ops._backend import TRITON_IS_INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.skipif(TRITON_IS_INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run(
        command, cwd=pytestconfig.rootpath, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    print(result.stdout[-200:])
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
