"""The Triton kernels run on a GPU if there is one, otherwise in Triton's interpreter in a separate process.

The variable TRITON_INTERPRET counts when Triton is imported, which other tests do, and must not be set for them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffupose.ops._backend import TRITON_IS_INTERPRETED, available_backends

# These files need a process in which Triton can run; test_in_interpreter.py starts one.
ANYWHERE = {"test_ahead_of_time.py", "test_in_interpreter.py"}
IN_TRITON = sorted({path.name for path in Path(__file__).parent.glob("test_*.py")} - ANYWHERE)
collect_ignore = [] if available_backends()["triton"][0] else IN_TRITON


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if TRITON_IS_INTERPRETED else "cuda")
