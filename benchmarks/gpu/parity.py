"""Stage ``parity``: the tests of the ops and of the lifter on the device, how many passed and which did not."""

from __future__ import annotations

import collections
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import ROOT, Record, Skip, arguments_of, run_stage

# What is run, and what of it: the tests of all backends by the device's name or a backend's of it, and all of Triton's,
# which have no other device. Fewer passed tests than the last number are a failure: something was not found.
ON_GPU = (
    (("tests/ops", "tests/engines"), "cuda and not cpu and not emulated", 300),
    (("tests/kernels",), "not ahead_of_time", 150),
)
ON_CPU = ((("tests/ops", "tests/engines", "tests/lifting"), "not cuda", 300),)


def body(record: Record, arguments: Any) -> None:
    """Run pytest and write what it found."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("no pytest")
    begin = time.monotonic()
    runs = ON_GPU if arguments.device.startswith("cuda") else ON_CPU
    if arguments.tests:
        runs = ((tuple(arguments.tests), arguments.select or "", 1),)
    for index, (tests, select, least) in enumerate(runs):
        left = arguments.seconds and (arguments.seconds - 5 - (time.monotonic() - begin)) / (len(runs) - index)
        run(record, tests, arguments.select or select, least, left)


def run(record: Record, tests: tuple[str, ...], select: str, least: int, seconds: float | None = None) -> None:
    """Run some tests and write what they found; what pytest prints stands in a file as it comes."""
    chosen = ["-k", select] if select else []
    name = " ".join(["pytest", *tests, *chosen])
    log = record.path.with_name(f"parity-{len(record.content['rows'])}.log")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-v", "--maxfail=60", f"--junitxml={report}", *chosen]
        if importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8:
            options += ["-n", str(min(os.cpu_count() or 1, 14))]  # compiling Triton's kernels takes most of the time
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "pytest", *options, *tests], cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                failed, message = [line for line in lines if "FAILED" in line], f"no end within {seconds:.0f} s"
                record.add(name=name, ok=False, message=message, failed=failed, last=lines[-5:])
                return
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text[-1500:])
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report: {text[-2000:]}")
        failures = len(record.failures)
        write(record, report, name, least)
    if status and len(record.failures) == failures:
        raise RuntimeError(f"pytest ended with {status}: {text[-2000:]}")


def write(record: Record, report: Path, command: str, least: int) -> None:
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
    ok = counts["failed"] == 0 and counts["passed"] >= least
    record.add(name=command, ok=ok, **counts, least=least, why_skipped=dict(skipped))


if __name__ == "__main__":
    sys.exit(run_stage("parity", arguments_of(__doc__), body))
