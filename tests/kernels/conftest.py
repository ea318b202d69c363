"""The Triton kernels run on a GPU where there is one, else in Triton's interpreter, in a process of its own.

The variable TRITON_INTERPRET counts when Triton is imported, which other tests do, and must not be set for them.
"""

from __future__ import annotations

import pytest
import torch

from diffupose.ops._backend import TRITON_IS_INTERPRETED, available_backends

# What needs a process in which Triton can run; test_in_interpreter.py starts one.
collect_ignore = (
    []
    if available_backends()["triton"][0]
    else [f"test_{name}.py" for name in ("captured_loop", "hypothesis_statistics", "lift", "modulated_graph_conv",
                                         "philox_normal", "reverse_step", "fused_network", "launch")]
)  # fmt: skip


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if TRITON_IS_INTERPRETED else "cuda")
