"""``diffupose env``: versions, the machine, which backends run here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from diffupose._version import __version__
from diffupose.commands.say import say
from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import SOURCE_STATE, available_backends, cpp

_SOURCE_STATES = {
    "no extension": "there is no usable extension to compare",
    "no sources": "installed without sources, nothing to compare",
    "match": "the extension was built from the sources beside it",
    "changed": "the sources changed since the build: run pip install -e . again",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("env", help="print versions, backends, and why one is not active")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Print the environment."""
    say(format_environment())


def _installed(distribution: str) -> str:
    """Return the version of a distribution without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    """Return one line per GPU that PyTorch sees."""
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in properties]


def _instruction_sets() -> str:
    """Return which instruction set the C++ engine uses and which run here, as an end of its line."""
    try:
        extension = cpp()
        return f", {extension.active_isa()} (runs here: {', '.join(extension.usable_isas())})"
    except BackendUnavailableError:
        return ""
    except ValueError as error:  # DIFFUPOSE_ISA names one that cannot be used
        return f"; {error}"


def environment() -> dict[str, Any]:
    """Return versions, machine and backends as plain data, ready for JSON.

    Example:
        >>> environment()["backends"]["torch"]["active"]
        True
    """
    versions = {"diffupose": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _installed(name) for name in ("numpy", "safetensors", "triton")}
    backends = {
        name: {"active": active, "reason": reason + (_instruction_sets() if name == "cpp" else "")}
        for name, (active, reason) in available_backends().items()
    }
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "backends": backends,
        "sources": _SOURCE_STATES[SOURCE_STATE],
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DIFFUPOSE_")},
    }


def format_environment() -> str:
    """Return :func:`environment` as text for people and bug reports, one fact per line."""
    env = environment()
    rows = [(name, version) for name, version in env["versions"].items()]
    rows += [
        ("platform", env["platform"]),
        ("cpu", f"{env['cpu_capability']}, {env['threads']} threads"),
        ("gpu", "; ".join(env["gpus"]) or "none that PyTorch sees"),
        ("torch cuda", env["cuda"] or "CPU build"),
        ("sources", env["sources"]),
        ("variables", " ".join(f"{name}={value}" for name, value in env["variables"].items()) or "none is set"),
    ]
    for name, state in env["backends"].items():
        rows.append((f"backend {name}", f"{'active' if state['active'] else 'inactive'}: {state['reason']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
