"""Stage ``build``: the package built in place without a network, what it was built with, and whether it loads."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu.record import ROOT, Record, arguments_of, run_stage

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tqdm", "matplotlib", "pytest", "hypothesis", "scipy", "setuptools",
    "pybind11", "ninja",
)  # fmt: skip


def body(record: Record, arguments: Any) -> None:
    """Install, then ask a new process what it finds."""
    record.set(commit=arguments.commit or commit(), packages={name: version(name) for name in PACKAGES})
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    record.set(nvcc=output([nvcc, "--version"]).splitlines()[-2:])
    environment = {**os.environ, "DIFFUPOSE_BUILD": "cuda" if arguments.device.startswith("cuda") else "cpu"}
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."]
    done = subprocess.run(pip, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:] + done.stderr[-4000:])
    # The rest are commands.
    said = re.findall(r"(?i).*(?:failed|error|warning).*\n(?:.*\n){0,3}", done.stdout + done.stderr)
    record.add(name="install", ok=done.returncode == 0, output="" if done.returncode == 0 else "".join(said)[:8000])
    code = "from diffupose.ops import available_backends; print(available_backends())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    wanted = "cuda" if arguments.device.startswith("cuda") else "cpp"
    active = f"'{wanted}': (True" in done.stdout
    record.add(name="backends", ok=active, output=(done.stdout + done.stderr)[-4000:].strip())


def version(name: str) -> str | None:
    """Return the version of a package, None if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(command: list[str]) -> str:
    """Return what a command prints, or why it could not be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        return str(error)


def commit() -> str:
    """Return the commit of the sources, and whether they were changed since."""
    if not (ROOT / ".git").exists():
        return "unknown"
    changed = "+changes" if output(["git", "status", "--porcelain", "--untracked-files=no"]).strip() else ""
    return output(["git", "rev-parse", "HEAD"]).strip() + changed


if __name__ == "__main__":
    sys.exit(run_stage("build", arguments_of(__doc__), body))
