"""Every Triton kernel is compiled ahead of time: none spills registers, none uses float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffupose.ops._backend import TRITON_IS_INTERPRETED

SUPPORT = Path(__file__).parents[1] / "support"
KERNELS = {
    "philox_normal_kernel",
    "reverse_step_kernel",
    "hypothesis_statistics_kernel",
    "moments_kernel",
    "modulated_graph_conv_fwd_kernel",
    "modulated_graph_conv_bwd_kernel",
    "modulated_graph_conv_sum_kernel",
}


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(TRITON_IS_INTERPRETED, reason="this process interprets"),
]


@pytest.fixture
def compiled(pytestconfig):
    """Compile kernels in a process without the interpreter; a cache keeps earlier results."""

    def compile_for(architecture: int, *options: str) -> list[dict[str, Any]]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(pytestconfig.rootpath / ".pytest_cache" / "triton")
        command = [sys.executable, SUPPORT / "compile_triton.py", *options, SUPPORT / "triton_calls.py"]
        done = subprocess.run(
            [*command, str(architecture)], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_for


def check(rows: list[dict[str, Any]], architecture: int) -> None:
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, architecture) for kernel in KERNELS}
    for row in rows:
        assert row["spills"] == 0 and row["local"] == 0, row
        assert row["reg"] <= 255 and row["dynamic_shared"] <= 48 << 10, row
        assert row["f64"] == 0, row  # most GPUs compute float64 64 times slower
        if row["kernel"] in ("philox_normal_kernel", "reverse_step_kernel"):
            # The hardware's logarithm, square root, sine and cosine are not exact enough for the noise.
            assert row["approx"] == 0, row


def test_every_kernel_compiles(compiled):
    rows = compiled(90, "--once")
    check(rows, 90)
    assert len(rows) == len(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_variant_compiles(compiled, architecture):
    check(compiled(architecture), architecture)
