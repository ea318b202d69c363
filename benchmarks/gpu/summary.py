"""Print what the stages of ``check.sh`` found, a line for each time; the exit status is 1 if any failed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.workloads.table import HEADER, aligned, times


def main() -> int:
    """Print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("stage", nargs="*")
    arguments = parser.parse_args()
    failed = False
    for stage in arguments.stage:
        path = arguments.out / f"{stage}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"status": "not begun"}
        failed = failed or content["status"] not in ("passed", "skipped")
        print(f"{stage:<12} {content['status']:<10} {content.get('reason', '')}")
        print("".join(f"    {line}\n" for line in lines_of(content.get("rows", []))), end="")
    return 1 if failed else 0


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rates and times among some rows, and what has none or failed."""
    lines = []
    for row in rows:
        name = " ".join(str(row[key]) for key in ("name", "case", "variant") if key in row)
        for key, unit in (("bytes_a_second", "TB/s"), ("flops_a_second", "TFLOP/s")):
            if key in row:
                lines.append(f"{name:<12} {row[key] / 1e12:10.3f} {unit}")
        if row.get("ok") is False:
            lines.append(f"FAILED {name} {row.get('failed', '')}"[:200])
        elif "not_run" in row:
            lines.append(f"{name}: {row['not_run']}"[:200])
    cells = times([row for row in rows if "case" in row])
    return lines + (aligned(HEADER, cells) if cells else [])


if __name__ == "__main__":
    sys.exit(main())
