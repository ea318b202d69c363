"""Stage ``rates``: what this device does at best, measured now: copies and matrix products."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import Record, arguments_of, run_stage
from benchmarks.workloads.measure import copy_rate, matmul_rate


def body(record: Record, arguments: Any) -> None:
    """Measure and write the rates."""
    device = torch.device(arguments.device)
    large = device.type == "cuda"
    record.add(name="copy", bytes_a_second=copy_rate(2 << 30 if large else 1 << 22, device))
    size = 8192 if large else 128
    record.add(name="bfloat16", flops_a_second=matmul_rate(size, torch.bfloat16, device))
    record.add(name="tf32", flops_a_second=matmul_rate(size, torch.float32, device, tf32=True))
    record.add(name="float32", flops_a_second=matmul_rate(size // 2, torch.float32, device))


def measured(out: Path, machine: dict[str, Any]) -> dict[str, float]:
    """Return the rates that the stage measured by name, empty where it has not, or on another machine, or not all."""
    path = out / "rates.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if content.get("status") != "passed" or content.get("machine") != machine:
        return {}
    return by_name(content["rows"])


def by_name(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the rates among some rows."""
    return {row["name"]: row.get("bytes_a_second", row.get("flops_a_second", 0.0)) for row in rows}


if __name__ == "__main__":
    sys.exit(run_stage("rates", arguments_of(__doc__), body))
