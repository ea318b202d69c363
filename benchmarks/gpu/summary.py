"""Print what the stages of ``check.sh`` found, a line for each time; the exit status is 1 if any failed.

``python -m benchmarks.gpu.summary --out FOLDER --markdown`` prints the times as a table for the documentation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", action="store_true", help="the table of times alone")
    parser.add_argument("stage", nargs="*")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(table(json.loads((arguments.out / "benchmarks.json").read_text(encoding="utf-8"))))
        return 0
    failed = False
    lines = []
    for stage in arguments.stage:
        path = arguments.out / f"{stage}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"status": "not begun"}
        failed = failed or content["status"] not in ("passed", "skipped")
        lines.append(f"{stage:<12} {content['status']:<10} {content.get('reason', '')}")
        if stage in ("benchmarks", "rates"):
            lines += [text for row in content.get("rows", []) if (text := line_of(row))]
        else:
            bad = [row for row in content.get("rows", []) if row.get("ok") is False]
            lines += [f"    FAILED {row.get('name')}" for row in bad[:20]]
    print("\n".join(lines))
    return 1 if failed else 0


def table(content: dict[str, Any]) -> str:
    """Return the times of a call as a Markdown table, with what each variant is of the eager one and of its floor."""
    rows = [row for row in content["rows"] if "milliseconds" in row]
    # Beside the eager one of the same precision.
    eager = {(row["case"], precision(row)): row["milliseconds"] for row in rows if row["variant"].startswith("eager")}
    machine = content["machine"]
    lines = [
        f"{machine.get('gpu', machine['device'])}, PyTorch {machine['torch']}:",
        "",
        "| case | variant | ms | times eager | of the floor |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        peer = eager.get((row["case"], precision(row)))
        times = f"{peer / row['milliseconds']:.2f}" if peer else ""
        share = row.get("kernel_of_copy_rate") or row.get("of_copy_rate") or row.get("of_product_rate")
        unit = "product" if "of_product_rate" in row and "kernel_of_copy_rate" not in row else "copy"
        floor = f"{100 * share:.0f} % ({unit})" if share else ""
        name = row["variant"] + (", not in a graph" if row.get("in_graph") is False else "")
        lines.append(f"| {row['case']} | {name} | {row['milliseconds']:.4g} | {times} | {floor} |")
    return "\n".join(lines)


def precision(row: dict[str, Any]) -> str:
    """Return what the products of a row are taken in, as its variant's name says."""
    return "bf16" if "bf16" in row["variant"] else "fp32"


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the benchmarks as a line."""
    if "name" in row:
        rate = row.get("bytes_a_second", row.get("flops_a_second", 0.0))
        return f"    {row['name']:<40} {rate / 1e12:10.3f} {'TB/s' if 'bytes_a_second' in row else 'TFLOP/s'}"
    head = f"    {row['case']:<60} {row['variant']:<20}"
    if "milliseconds" not in row:
        return f"{head} {row.get('not_run') or row.get('failed') or 'wrong: error ' + str(row.get('error'))}"[:200]
    text = f"{head} {row['milliseconds']:10.4f} ms"
    for key, what in (
        ("of_copy_rate", "of copy"),
        ("of_product_rate", "of product"),
        ("kernel_of_copy_rate", "of copy, kernel alone"),
    ):
        if key in row:
            text += f" {100 * row[key]:6.1f} % {what}"
    return text


if __name__ == "__main__":
    sys.exit(main())
