"""Stage ``triton``: ``benchmarks/gpu_triton.py``, whose rows become those of the stage."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT, Record, Skip, arguments_of, run_stage


def body(record: Record, arguments: Any) -> None:
    """Run the script and take its rows over."""
    if importlib.util.find_spec("triton") is None:
        raise Skip("no Triton")
    with tempfile.TemporaryDirectory() as folder:
        kind = arguments.device.partition(":")[0]
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_triton.py"), "--out", folder, "--device", kind]
        done = subprocess.run([*command, *(["--no-compile"] if arguments.no_compile else [])], cwd=ROOT, check=False)
        path = Path(folder) / "gpu_triton.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    record.set(**{key: value for key, value in content.items() if key != "rows"})
    for row in content.get("rows", []):
        record.add(**row)
    if done.returncode or not content.get("rows"):
        raise RuntimeError(f"gpu_triton.py ended with {done.returncode} and {len(content.get('rows', []))} rows")


if __name__ == "__main__":
    sys.exit(run_stage("triton", arguments_of(__doc__), body))
