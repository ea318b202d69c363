"""The CUDA extension for machines without a GPU: the .cu files compiled as C++, every CUDA thread a fibre."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from diffupose.ops import _backend

ROOT = Path(__file__).resolve().parents[2]


def setup_module() -> ModuleType:
    """Return setup.py as a module."""
    spec = importlib.util.spec_from_file_location("diffupose_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_extension() -> ModuleType:
    """Build (what changed) and return ``_cuda`` for the CPU."""
    if os.environ.get("DIFFUPOSE_BUILD") == "none":
        pytest.skip("DIFFUPOSE_BUILD=none: nothing is compiled")
    build = setup_module()
    if not build.find_compiler() or not build.find_ninja():
        pytest.skip("no C++ compiler or no ninja")
    path = build.BUILD / "emulation" / f"_cuda{build.EXT_SUFFIX}"
    build.compile_extension("_cuda_emulated", path)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make ``"cuda"`` a backend that takes tensors on the CPU, for one test."""
    module = emulated_extension()
    monkeypatch.setattr(_backend, "_CUDA", module)
    monkeypatch.setattr(_backend, "_cuda_state", lambda: (True, "emulated"))
    monkeypatch.setattr(_backend, "_DEVICE_OF", {**_backend._DEVICE_OF, "cuda": "cpu"})
    return module
