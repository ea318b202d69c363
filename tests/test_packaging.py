"""Tests of what is installed and what a wheel holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.compiled import locked
from support.cuda_emulation import setup_module

import diffupose

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with locked(ROOT / "build" / "setup"):  # builds at the same time would write the same object files
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this tree, built offline by the installed tools."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    result = run(sys.executable, "-m", "pip", "wheel", "-v", *options, ".")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_has_one_top_level_package(names):
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"diffupose"}


def test_wheel_has_every_module_and_no_other(names):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffupose").rglob("*.py")}
    modules |= {f"diffupose/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "diffupose/kernels/__init__.py" in modules


def test_wheel_has_the_data_files(names):
    tracked = run("git", "ls-files", "diffupose")
    if tracked.returncode:
        pytest.skip("not a git checkout")
    data = {name for name in tracked.stdout.split() if not name.endswith(".py")}
    assert "diffupose/py.typed" in data
    assert data <= names


def test_wheel_has_the_extension_that_was_asked_for(names, wheel):
    extensions = [name for name in names if name.endswith(".so")]
    mode = os.environ.get("DIFFUPOSE_BUILD", "auto")
    if mode == "cpu":
        assert len(extensions) == 1
    if mode == "cuda":
        assert len(extensions) == 2
    if mode == "none":
        assert extensions == []
        assert wheel.name.endswith("-py3-none-any.whl")
    built = {Path(name).name.split(".")[0] for name in extensions}
    assert built <= {"_C", "_cuda"}
    # `diffupose env` says why one is missing.
    for name, reason in (("_C", "_no_extension.txt"), ("_cuda", "_no_cuda.txt")):
        assert (f"diffupose/{reason}" in names) == (name not in built)


def test_metadata():
    metadata = importlib.metadata.metadata("diffupose")
    assert metadata["Version"] == diffupose.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_kernels_come_with_the_package(tmp_path):
    """Also from a folder where no `kernels` lies beside the caller, and without Triton."""
    code = "import sys; sys.modules['triton'] = None; import diffupose.kernels; print(diffupose.kernels.__doc__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Triton kernels" in result.stdout


def test_import_is_cheap():
    """Nothing that only some calls need is imported with the package."""
    code = (
        "import sys, diffupose, diffupose.ops, diffupose.reference, diffupose.commands.env\n"
        "late = {'matplotlib', 'triton', 'scipy', 'diffusers', 'tensorboard', 'pytest'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_unknown_build_mode_names_the_choices():
    result = run(sys.executable, "setup.py", "--version", DIFFUPOSE_BUILD="gpu")
    assert result.returncode != 0
    assert "DIFFUPOSE_BUILD must be one of auto, cuda, cpu, none; got 'gpu'" in result.stderr


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_build_without_nvcc(mode, tmp_path):
    """`auto` goes on with one line about it, `cuda` fails."""
    build = ["build", "--build-base", str(tmp_path)]
    result = run(sys.executable, "setup.py", *build, DIFFUPOSE_BUILD=mode, NVCC="no-such-nvcc")
    reason = "NVCC names 'no-such-nvcc', which is not there"
    if mode == "cuda":
        assert result.returncode != 0
        assert f"DIFFUPOSE_BUILD=cuda: {reason}" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert f"not built: _cuda ({reason})" in result.stdout
        (path,) = tmp_path.rglob("_no_cuda.txt")
        assert path.read_text() == reason + "\n"


def fake_nvcc(folder, script):
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ["80/sm_80", "90a/sm_90a", "120/sm_120", "120/compute_120"]),  # what this nvcc does not know is left out
        ("9.0", ["90/sm_90"]),
        # As images of frameworks set it: what is too old for the kernels is left out.
        ("5.2 7.5 8.0;9.0+PTX", ["80/sm_80", "90/sm_90", "90/compute_90"]),
        ("8.0;", ["80/sm_80"]),
        ("7.5", "TORCH_CUDA_ARCH_LIST, '7.5', has no architecture that the kernels run on: 8.0 or newer"),
        ("Ampere", "TORCH_CUDA_ARCH_LIST names 'Ampere', nvcc has 75, 80, 90, 120"),
    ],
)
def test_architectures(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    nvcc = fake_nvcc(tmp_path, "echo sm_75; echo sm_80; echo sm_90; echo sm_120")
    architectures = setup_module().cuda_architectures
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=re.escape(expected)):
            architectures(nvcc)
    else:
        flags = [f"-gencode=arch=compute_{pair.split('/')[0]},code={pair.split('/')[1]}" for pair in expected]
        assert architectures(nvcc) == flags


def test_a_broken_nvcc_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"nvcc --list-gpu-code ended with 3 and said: no licence"):
        setup_module().cuda_architectures(fake_nvcc(tmp_path, "echo no licence >&2; exit 3"))
    (tmp_path / "nvcc").write_text("")
    (tmp_path / "nvcc").chmod(0o644)
    with pytest.raises(RuntimeError, match="nvcc cannot be run: Permission denied"):
        setup_module().cuda_architectures([str(tmp_path / "nvcc")])


def test_nvcc_gets_the_compiler_behind_a_launcher():
    host_compiler = setup_module().host_compiler
    assert host_compiler(["/usr/bin/ccache", "g++", "-m64"]) == "g++"
    assert host_compiler(["clang++"]) == "clang++"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_unknown_architecture_names_the_choices(tmp_path):
    build = ["build", "--build-base", str(tmp_path)]
    result = run(sys.executable, "setup.py", *build, DIFFUPOSE_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0a;77.0")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST names '77.0', nvcc has " in result.stderr


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_build_without_a_compiler(mode, tmp_path):
    """`auto` goes on with one line about it, `cpu` fails."""
    build = ["build", "--build-base", str(tmp_path)]
    result = run(sys.executable, "setup.py", *build, DIFFUPOSE_BUILD=mode, CXX="no-such-compiler")
    if mode == "cpu":
        assert result.returncode != 0
        assert "DIFFUPOSE_BUILD=cpu: no C++ compiler found" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "diffupose: built nothing, the PyTorch code is used; not built: _C (no C++ compiler" in result.stdout
        assert not list(tmp_path.rglob("*.so"))
        (reason,) = tmp_path.rglob("_no_extension.txt")
        assert reason.parent.name == "diffupose"
        assert reason.read_text() == "no C++ compiler found (install one, or set CXX)\n"


def test_build_that_was_not_wanted_says_so(tmp_path):
    result = run(sys.executable, "setup.py", "build", "--build-base", str(tmp_path), DIFFUPOSE_BUILD="none")
    assert result.returncode == 0, result.stderr
    (reason,) = tmp_path.rglob("_no_extension.txt")
    assert reason.read_text() == "DIFFUPOSE_BUILD=none asked for it\n"


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ({"DIFFUPOSE_BUILD": "auto", "CXX": "no-such-compiler"}, "no C++ compiler found (install one, or set CXX)\n"),
        ({"DIFFUPOSE_BUILD": "none"}, "DIFFUPOSE_BUILD=none asked for it\n"),
    ],
)
def test_in_place_build_leaves_its_reason(tmp_path, variable, reason):
    """As for `pip install -e .`, in a copy of what the build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "diffupose").mkdir()
    for name in ("__init__.py", "_source_hash.py"):
        shutil.copy(ROOT / "diffupose" / name, tmp_path / "diffupose")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variable, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "diffupose" / "_no_extension.txt").read_text() == reason
