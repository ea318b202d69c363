"""Stage ``parity``: the tests of the ops and of the lifter on the device, how many passed and which did not."""

from __future__ import annotations

import collections
import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from record import ROOT, Record, Skip, arguments_of, run_stage

TESTS = ("tests/ops", "tests/kernels", "tests/test_lifter.py", "tests/test_cuda_binary.py")


def body(record: Record, arguments: Any) -> None:
    """Run pytest and write what it found."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("no pytest")
    on_gpu = arguments.device.startswith("cuda")
    # By default the tests that name the device or a backend of it.
    select = arguments.select or ("cuda or triton" if on_gpu else "not cuda")
    tests = [name for name in arguments.tests or TESTS if (ROOT / name).exists()]
    record.set(command=" ".join(["pytest", *tests, "-k", select]))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--maxfail=40", f"--junitxml={report}", "-k", select]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(done.stdout[-3000:])
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report: {(done.stdout + done.stderr)[-2000:]}")
        write(record, report)
    if done.returncode and not record.failures:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")


def write(record: Record, report: Path) -> None:
    """Read pytest's report: counts, why tests were skipped, and what failed."""
    counts: collections.Counter[str] = collections.Counter(passed=0, failed=0, skipped=0)
    skipped: collections.Counter[str] = collections.Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if failure is not None:
            counts["failed"] += 1
            record.add(name=name, ok=False, message=(failure.get("message") or "")[:500])
        elif skip is not None:
            counts["skipped"] += 1
            skipped[skip.get("message") or ""] += 1
        else:
            counts["passed"] += 1
    record.set(counts=dict(counts), skipped=dict(skipped))
    record.add(name="parity", ok=counts["failed"] == 0 and counts["passed"] > 0, **counts)


if __name__ == "__main__":
    sys.exit(run_stage("parity", arguments_of(__doc__), body))
