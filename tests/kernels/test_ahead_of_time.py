"""Every Triton kernel compiled for GPUs that need not be there: none spills, and none uses float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffupose.ops._backend import TRITON_IS_INTERPRETED

SUPPORT = Path(__file__).parents[1] / "support"
ARCHITECTURES = ("80", "90", "100")
KERNELS = {
    "philox_normal_kernel",
    "reverse_step_kernel",
    "hypothesis_statistics_kernel",
    "moments_kernel",
    "modulated_graph_conv_fwd_kernel",
    "modulated_graph_conv_bwd_kernel",
    "modulated_graph_conv_sum_kernel",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(TRITON_IS_INTERPRETED, reason="this process interprets")
def test_kernels_compile(pytestconfig):
    # A process that does not interpret; what was compiled before is not compiled again.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.rootpath / ".pytest_cache" / "triton")
    command = [sys.executable, SUPPORT / "compile_triton.py", SUPPORT / "triton_calls.py"]

    def compile_for(architecture: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, architecture], capture_output=True, text=True, env=environment, check=False)

    # A compiler has one thread: as many at once as there are architectures take half the time or less.
    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        results = list(pool.map(compile_for, ARCHITECTURES))
    assert [result.returncode for result in results] == [0] * len(results), "".join(item.stderr for item in results)
    rows = [json.loads(line) for result in results for line in result.stdout.splitlines()]
    compiled = {(row["kernel"], row["arch"]) for row in rows}
    assert compiled == {(kernel, int(architecture)) for kernel in KERNELS for architecture in ARCHITECTURES}
    for row in rows:
        assert row["spills"] == 0 and row["local"] == 0, row
        assert row["reg"] <= 255 and row["dynamic_shared"] <= 48 << 10, row
        assert row["f64"] == 0, row  # GPUs that are not made for it take 64 times as long
        if row["kernel"] in ("philox_normal_kernel", "reverse_step_kernel"):
            # The hardware's logarithm, square root, sine and cosine are not exact enough for the noise.
            assert row["approx"] == 0, row
