"""Stage ``sanitizer``: every op under compute-sanitizer, for accesses outside of arrays and races in shared memory.

racecheck does not follow barriers that some threads only arrive at: it reports hazards in kernels that take turns by
them and have no race (``docs/gpu.md``). What it reports of the kernel that does so is written down, and not judged.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.record import ROOT, Record, Skip, arguments_of, run_stage

# What is watched: by a name, the tool, and which calls of every_op.py. All at once, as the tools take minutes.
PERSISTENT = "racecheck of the persistent kernel"
RUNS = {
    "memcheck": ("memcheck", ""),
    "racecheck of the ops and of kernels for layers": ("racecheck", "^(?!.*(persistent|cluster))"),
    PERSISTENT: ("racecheck", "persistent"),
    "racecheck of clusters, paper": ("racecheck", "paper.*cluster"),
    "racecheck of clusters, base": ("racecheck", "base.*cluster"),
}
CANDIDATES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def body(record: Record, arguments: Any) -> None:
    """Run the tools."""
    if not arguments.device.startswith("cuda"):
        raise Skip("compute-sanitizer watches GPUs")
    program = next(filter(None, map(shutil.which, CANDIDATES)), None)
    if program is None:
        raise Skip("no compute-sanitizer")
    seconds = arguments.tool_seconds or (arguments.seconds or 400) - 5
    script = [sys.executable, "-m", "benchmarks.gpu.every_op", "--device", arguments.device]
    with ThreadPoolExecutor(len(RUNS)) as pool:
        watched = {}
        for name, (tool, select) in RUNS.items():
            # Kernels of PyTorch itself are left alone: they would take most of the time and are not ours to judge.
            options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=diffupose"]
            # `timeout` ends what the tool started as well.
            command = ["timeout", "--kill-after=2", f"{seconds:.0f}", program, *options, *script, "--backend", "cuda"]
            # Each tensor in memory of its own: inside the blocks that PyTorch keeps, an access too far goes unseen.
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            watched[name] = pool.submit(run, [*command, "--select", select], os.environ | own)
        for name, done in watched.items():
            status, text = done.result()
            row = {"name": name, "ok": verdict(text, status), "exit": status, "summary": summary(text)}
            if not row["ok"]:
                record.set(**{f"{name}, output": text[:30_000]})
                if name == PERSISTENT and status == 9 and ran(text) and kernels_of(text) == {"wgmma_kernel"}:
                    del row["ok"]
                    row["not_judged"] = "the tool reports hazards of such turns in kernels without a race as well"
            record.add(**row)


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Return exit status and output of a command."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        return 1, str(error)
    return done.returncode, (done.stdout + done.stderr).replace(
        f"{ROOT}/", ""
    )  # paths from the root: results must not name a person's folders


def kernels_of(text: str) -> set[str]:
    """Return the kernels in which racecheck reports hazards."""
    return set(re.findall(r"(?:Read|Write) access at .*?(\w+_kernel)\b", text))


def summary(text: str) -> str:
    """Return the tool's own last line, and what the script said."""
    lines = re.findall(r"=========\s+(ERROR SUMMARY.*|RACECHECK SUMMARY.*)", text)
    ran = re.findall(r"^(\d+ calls ran)$", text, re.MULTILINE)
    return "; ".join([*lines, *ran]) or text[-500:]


def verdict(text: str, status: int) -> bool:
    """Return whether the script ran something to its end and the tool found nothing."""
    clean = re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", text)
    return status == 0 and clean is not None and ran(text)


def ran(text: str) -> bool:
    """Return whether the script says that it ran something, which it does at its end."""
    return re.search(r"^[1-9]\d* calls ran$", text, re.MULTILINE) is not None


if __name__ == "__main__":
    sys.exit(run_stage("sanitizer", arguments_of(__doc__), body))
