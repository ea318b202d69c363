"""What a stage of ``check.sh`` writes down: one JSON file, on the disk again after every entry."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Skip(Exception):
    """A stage cannot run here, and why."""


class NoGpu(Exception):
    """There is no GPU: what holds for one stage holds for all."""


NO_GPU = 3  # the exit status that says so


class Record:
    """The file of a stage.

    Args:
        out: Folder.
        stage: Name of the stage and of the file.
    """

    def __init__(self, out: Path, stage: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"{stage}.json"
        self.content: dict[str, Any] = {"stage": stage, "status": "cut off", "rows": []}
        self.flush()

    def set(self, **values: Any) -> None:
        """Write values beside the rows."""
        self.content.update(values)
        self.flush()

    def add(self, **row: Any) -> None:
        """Write a row, and print it."""
        self.content["rows"].append(row)
        self.flush()
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)

    def flush(self) -> None:
        """Put the file on the disk, whole or not at all."""
        partial = self.path.with_suffix(".part")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Rows that say they failed."""
        return [row for row in self.content["rows"] if row.get("ok") is False]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments_of(description: str | None) -> Any:
    """Return the arguments: every stage takes those of all of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code at tiny sizes")
    parser.add_argument("--commit", default="", help="build: what the sources are, where git cannot tell")
    parser.add_argument("--validation", type=Path, help="accuracy: mocap_val.npz")
    parser.add_argument("--seconds", type=float, help="what the stage may take")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="parity: files and folders")
    parser.add_argument("--select", metavar="TEXT", help="parity: what pytest -k takes")
    parser.add_argument("--tool-seconds", type=float, help="sanitizer: limit of each tool")
    parser.add_argument("--cases", default="", metavar="REGEX", help="benchmarks: only where case and variant have it")
    parser.add_argument("--no-compile", action="store_true", help="benchmarks: without torch.compile")
    return parser.parse_args()


def run_stage(stage: str, arguments: Any, body: Callable[[Record, Any], None]) -> int:
    """Run a stage and return its exit status; whatever happens stands in the file."""
    record = Record(arguments.out, stage)
    begin = time.monotonic()
    status, reason, code = "passed", "", 1
    try:
        record.set(machine=machine(arguments.device))
        body(record, arguments)
        if record.failures:
            status, reason = "failed", f"{len(record.failures)} of {len(record.content['rows'])} rows failed"
    except Skip as error:
        status, reason = "skipped", str(error)
    except NoGpu as error:
        status, reason, code = "failed", str(error), NO_GPU
    except Exception as error:  # the other stages go on, and the file says what happened
        status, reason = "failed", f"{type(error).__name__}: {error}"
        record.set(traceback=traceback.format_exc())
        traceback.print_exc()
    record.set(status=status, reason=reason, seconds=round(time.monotonic() - begin, 1))
    print(f"{stage}: {status}{': ' + reason if reason else ''}", flush=True)
    return code if status == "failed" else 0


def machine(device: str) -> dict[str, Any]:
    """Return what a figure depends on."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": device}
    try:
        import torch
    except ImportError:
        return found
    found["torch"] = torch.__version__
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NoGpu("PyTorch sees no GPU; --device cpu tries the code at tiny sizes")
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found
