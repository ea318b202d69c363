"""``gpu_triton.py`` runs through on a machine without a GPU: in the interpreter, small, nothing timed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def bench_script_runs(benchmark, tmp_path):
    script = Path(__file__).with_name("gpu_triton.py")
    command = [sys.executable, script, "--device", "cpu", "--no-compile", "--out", tmp_path]
    result = benchmark.pedantic(
        subprocess.run, args=(command,), kwargs={"capture_output": True, "text": True}, rounds=1
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "gpu_triton.json").read_text(encoding="utf-8"))
    assert {row["case"].split()[0] for row in content["rows"]} == {
        "reverse_step", "hypothesis_statistics", "modulated_graph_conv", "sample",
    }  # fmt: skip
    assert all(row["milliseconds"] is None for row in content["rows"])
