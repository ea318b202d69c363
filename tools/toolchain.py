"""Which compilers ``setup.py`` uses, and for which GPUs it compiles."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# GPUs that _cuda is built for unless TORCH_CUDA_ARCH_LIST names others. The GPU of this machine is not asked.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
OLDEST_ARCHITECTURE = 80  # the first with bfloat16 and its matrix instructions
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # may stand before the compiler in CXX; nvcc takes none


def find_command(*candidates: str) -> list[str]:
    """Return the first command, split at spaces, whose program exists; empty if there is none."""
    commands = (shlex.split(candidate) for candidate in candidates)
    return next((command for command in commands if command and shutil.which(command[0])), [])


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command, empty if there is none."""
    return find_command(*([os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]))


def find_ninja() -> list[str]:
    """Return ninja as a command, empty if there is none. PATH may lack the script of the Python package."""
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else find_command("ninja")


def find_nvcc() -> list[str]:
    """Return nvcc as a command, empty if there is none."""
    given = os.environ.get("NVCC")
    homes = [shlex.quote(f"{os.environ[name]}/bin/nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    command = find_command(*([given] if given else [*homes, "nvcc", "/usr/local/cuda/bin/nvcc"]))
    if given and not command:
        raise RuntimeError(f"NVCC names {given!r}, which is not there")
    return command


def cuda_architectures(nvcc: list[str]) -> list[str]:
    """Return nvcc's flags for what TORCH_CUDA_ARCH_LIST names, such as "8.0;9.0a;10.0+PTX".

    GPUs older than 8.0 are left out, since the kernels do not run on them. A GPU that this nvcc does not know is left
    out of the default list, and is an error in a given one.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    try:
        asked = subprocess.run([*nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{shlex.join(nvcc)} cannot be run: {error.strerror}") from None
    known = [name.removeprefix("sm_") for name in asked.stdout.split()]
    if asked.returncode or not known:
        said = (asked.stderr or asked.stdout).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{shlex.join(nvcc)} --list-gpu-code ended with {asked.returncode} and said: {said[-1]}")
    flags = []
    for entry in filter(None, (given or CUDA_ARCHITECTURES).split(";")):
        number = entry.removesuffix("+PTX").replace(".", "")
        plain = number.rstrip("af")
        if plain.isdigit() and int(plain) < OLDEST_ARCHITECTURE:
            continue
        if plain in known:
            kinds = ["sm", "compute"] if entry.endswith("+PTX") else ["sm"]
            flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
        elif given:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST names {entry!r}, nvcc has {', '.join(known)}")
    if not flags:
        what = f"TORCH_CUDA_ARCH_LIST, {given!r}," if given else "nvcc"
        raise RuntimeError(f"{what} has no architecture that the kernels run on: 8.0 or newer")
    return flags


def host_compiler(compiler: list[str]) -> str:
    """Return the program of a compiler's command, for nvcc."""
    return next((word for word in compiler if Path(word).name not in LAUNCHERS), compiler[0])
