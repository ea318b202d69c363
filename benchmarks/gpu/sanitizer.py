"""Stage ``sanitizer``: every op under compute-sanitizer, for accesses outside of arrays and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT, Record, Skip, arguments_of, run_stage

TOOLS = ("memcheck", "racecheck")
COMPILERS = ("nvcc", "/usr/local/cuda/bin/nvcc")
CASES = ("none", "registers", "constants")  # of arrivals.cu
CANDIDATES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def body(record: Record, arguments: Any) -> None:
    """Run the tools one after the other."""
    if not arguments.device.startswith("cuda"):
        raise Skip("compute-sanitizer watches GPUs")
    program = next(filter(None, map(shutil.which, CANDIDATES)), None)
    if program is None:
        raise Skip("no compute-sanitizer")
    script = [sys.executable, str(Path(__file__).with_name("every_op.py")), "--device", arguments.device]
    for tool in TOOLS:
        # Kernels of PyTorch itself are left alone: they would take most of the time and are not ours to judge.
        options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=diffupose"]
        # Each tensor in memory of its own: inside the blocks that PyTorch keeps, an access too far goes unseen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else dict(os.environ)
        try:
            seconds = arguments.tool_seconds or ((arguments.seconds or 400) - 5) / len(TOOLS)
            # `timeout` ends what the tool started as well.
            done = subprocess.run(
                ["timeout", "--kill-after=2", f"{seconds:.0f}", program, *options, *script, "--backend", "cuda"],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            text = (done.stdout + done.stderr).replace(f"{ROOT}/", "")  # where it lies is nobody's business
            ok = verdict(text, done.returncode)
            record.set(**{f"{tool}_output": text[:50_000] if not ok else ""})
            record.add(name=tool, ok=ok, exit=done.returncode, summary=summary(text))
        except OSError as error:
            record.add(name=tool, ok=False, summary=str(error))
    judge_racecheck(record, program)


def judge_racecheck(record: Record, program: str) -> None:
    """Record the hazards that racecheck sees in ``arrivals.cu``, where there are none: how far it is to be believed."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        built, source = f"{folder}/arrivals", str(Path(__file__).with_name("arrivals.cu"))
        compiled = subprocess.run(
            [compiler, "-arch=native", source, "-o", built], capture_output=True, text=True, check=False
        )
        if compiled.returncode:
            record.add(name="racecheck of kernels without a race", ok=False, summary=compiled.stderr[-500:])
            return
        for case in CASES:
            command = ["timeout", "--kill-after=2", "20", program, "--tool", "racecheck", built, case]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            ran, text = "no error, 0 wrong" in done.stdout, done.stdout + done.stderr
            record.add(name=f"racecheck of kernels without a race, turns: {case}", ok=ran, summary=summary(text))


def summary(text: str) -> str:
    """Return the tool's own last line, and what the script said."""
    lines = re.findall(r"=========\s+(ERROR SUMMARY.*|RACECHECK SUMMARY.*)", text)
    ran = re.findall(r"^(\d+ calls ran)$", text, re.MULTILINE)
    return "; ".join([*lines, *ran]) or text[-500:]


def verdict(text: str, status: int) -> bool:
    """Return whether the script ran something to its end and the tool found nothing."""
    clean = re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", text)
    return status == 0 and clean is not None and re.search(r"^[1-9]\d* calls ran$", text, re.MULTILINE) is not None


if __name__ == "__main__":
    sys.exit(run_stage("sanitizer", arguments_of(__doc__), body))
