"""The CUDA extension for machines without a GPU: the .cu files compiled as C++, every CUDA thread a fibre."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import subprocess
from types import ModuleType

import pytest
from support.compiled import ROOT, cache_folder, compiled_once, content_hash, files_below

from diffupose.ops import _backend


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
    compiler = build.find_compiler()
    if not compiler or not build.find_ninja():
        pytest.skip("no C++ compiler or no ninja")
    sources = [ROOT / "setup.py", ROOT / "tools/toolchain.py", *files_below("csrc", "tests/cpp/cuda_emulation")]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    content = content_hash(sources, *compiler, version, build.EXT_SUFFIX, importlib.metadata.version("pybind11"))
    # A folder of its own: the extensions of an installation are not compiled at the same time in the same place.
    build.BUILD = cache_folder() / "emulation"
    path = compiled_once(
        f"_cuda{build.EXT_SUFFIX}", content, lambda path: build.compile_extension("_cuda_emulated", path)
    )
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
