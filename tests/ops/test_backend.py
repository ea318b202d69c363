"""Tests of the backend choice."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from diffupose import ops
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend
from diffupose.ops._backend import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeExtension:
    """A stand-in for diffupose._C, built from sources with this hash."""

    def __init__(self, source_hash: str):
        self._source_hash = source_hash

    def source_hash(self) -> str:
        return self._source_hash

    def has_openmp(self) -> bool:
        return True


def states(**changes: bool) -> dict[str, tuple[bool, str]]:
    return {name: (changes.get(name, True), f"about {name}") for name in ("torch", "cpp", "cuda", "triton")}


def test_auto_takes_the_first_that_can(monkeypatch):
    every = ("torch", "cpp", "cuda", "triton")
    monkeypatch.setattr(_backend, "backend_state", lambda name: states()[name])
    assert choose_backend("auto", CPU, every) == "cpp"
    assert choose_backend("auto", CPU, ("torch", "cuda")) == "torch"
    assert choose_backend("auto", CUDA, every) == "cuda"
    assert choose_backend("auto", CUDA, ("torch", "triton")) == "triton"
    assert choose_backend("auto", torch.device("mps"), every) == "torch"
    monkeypatch.setattr(_backend, "backend_state", lambda name: states(cpp=False, cuda=False)[name])
    assert choose_backend("auto", CPU, every) == "torch"
    assert choose_backend("auto", CUDA, every) == "triton"


def test_a_named_backend_runs_or_says_why_not(monkeypatch):
    monkeypatch.setattr(_backend, "backend_state", lambda name: states(cuda=False)[name])
    assert choose_backend("torch", CUDA, ("torch",)) == "torch"
    assert choose_backend("cpp", CPU, ("torch", "cpp")) == "cpp"
    with pytest.raises(BackendUnavailableError, match='"cuda" is not available: about cuda'):
        choose_backend("cuda", CUDA, ("torch", "cuda"))
    with pytest.raises(BackendUnavailableError, match="this op has torch only"):
        choose_backend("cpp", CPU, ("torch",))
    with pytest.raises(BackendUnavailableError, match='"cpp" runs on cpu tensors, these are on cuda'):
        choose_backend("cpp", CUDA, ("torch", "cpp"))
    with pytest.raises(ValueError, match="backend must be one of auto, torch, cpp, cuda, triton; got 'gpu'"):
        choose_backend("gpu", CPU, ("torch",))


def test_inputs_that_a_backend_cannot_take(monkeypatch):
    monkeypatch.setattr(_backend, "backend_state", lambda name: states()[name])
    unfit = {"cpp": "it takes float32, got float64"}
    assert choose_backend("auto", CPU, ("torch", "cpp"), unfit=unfit) == "torch"
    assert choose_backend("torch", CPU, ("torch", "cpp"), unfit=unfit) == "torch"
    with pytest.raises(BackendUnavailableError, match='"cpp" is not available: it takes float32, got float64'):
        choose_backend("cpp", CPU, ("torch", "cpp"), unfit=unfit)


def test_argument_wins_over_environment(monkeypatch):
    monkeypatch.setattr(_backend, "backend_state", lambda name: states()[name])
    monkeypatch.setattr(_backend, "_FROM_ENVIRONMENT", "torch")
    assert choose_backend(None, CPU, ("torch", "cpp")) == "torch"
    assert choose_backend("cpp", CPU, ("torch", "cpp")) == "cpp"
    assert choose_backend("auto", CPU, ("torch", "cpp")) == "cpp"
    monkeypatch.setattr(_backend, "_FROM_ENVIRONMENT", "nonsense")
    with pytest.raises(ValueError, match=r"the environment variable DIFFUPOSE_BACKEND must be one of .*'nonsense'"):
        choose_backend(None, CPU, ("torch", "cpp"))


def test_environment_is_read_at_import(monkeypatch):
    """In a fresh process, an unavailable backend from the environment raises an error instead of falling back."""
    monkeypatch.setenv("DIFFUPOSE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = "import torch, diffupose.ops as o; o.philox_normal(0, torch.arange(1), torch.arange(1), 0, 4)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'BackendUnavailableError: backend "triton" ' in result.stderr


LANGUAGES = {"_C": "C++", "_cuda": "CUDA"}


def load_with(monkeypatch, result, extension="_C"):
    def import_module(name: str) -> object:
        assert name == f"diffupose.{extension}"
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(_backend.importlib, "import_module", import_module)
    return _backend._load(extension, LANGUAGES[extension])


@pytest.mark.parametrize(("extension", "file"), [("_C", "_no_extension.txt"), ("_cuda", "_no_cuda.txt")])
def test_extension_that_is_missing_or_broken(monkeypatch, tmp_path, extension, file):
    missing, sentence = (
        ModuleNotFoundError(f"No module named 'diffupose.{extension}'"),
        f"diffupose was built without its {LANGUAGES[extension]} extension",
    )
    monkeypatch.setattr(_backend, "_PACKAGE", tmp_path)
    assert load_with(monkeypatch, missing, extension) == (None, "no extension", sentence)
    (tmp_path / file).write_text("no compiler found\n")
    assert load_with(monkeypatch, missing, extension) == (None, "no extension", f"{sentence}: no compiler found")
    module, state, reason = load_with(monkeypatch, ImportError("undefined symbol: omp_get_max_threads"))
    assert (module, state) == (None, "no extension")
    assert "undefined symbol" in reason


def test_extension_of_other_sources_is_refused_with_a_warning(monkeypatch):
    monkeypatch.setattr(_backend, "source_hash", lambda csrc: "new")
    with pytest.warns(RuntimeWarning, match=r"the C\+\+ sources changed since the build: run pip install -e \. again"):
        module, state, reason = load_with(monkeypatch, FakeExtension("old"))
    assert (module, state) == (None, "changed")
    assert "run pip install -e . again" in reason


def test_extension_of_these_sources_is_taken(monkeypatch):
    monkeypatch.setattr(_backend, "source_hash", lambda csrc: "new")
    extension = FakeExtension("new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_with(monkeypatch, extension) == (extension, "match", "")


class FakeCuda:
    def __init__(self, driver: int, has_code: bool = True) -> None:
        self._driver, self._has_code = driver, has_code

    def runtime_version(self) -> int:
        return 13000

    def driver_version(self) -> int:
        return self._driver

    def has_code(self) -> bool:
        return self._has_code


def cuda_state() -> tuple[bool, str]:
    return _backend._cuda_state.__wrapped__()  # as at its first call


def test_an_op_on_the_cpu_does_not_ask_for_a_gpu(monkeypatch):
    """In a process forked from one that used a GPU, asking for a GPU is an error."""

    def fail():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(_backend, "_cuda_state", fail)
    monkeypatch.setattr(_backend, "_triton_state", fail)
    ids = torch.arange(2)
    for backend in (None, "auto", "torch"):
        assert ops.philox_normal(0, ids, ids, 0, 3, backend=backend).shape == (2, 2, 3)


def test_cuda_without_a_gpu_or_an_extension_says_why(monkeypatch):
    monkeypatch.setattr(_backend, "_CUDA", None)
    monkeypatch.setattr(_backend, "_CUDA_REASON", "it is raining")
    assert cuda_state() == (False, "it is raining")
    monkeypatch.setattr(_backend, "_CUDA", FakeCuda(0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_state() == (False, "this PyTorch is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_state() == (False, "PyTorch sees no GPU")
    monkeypatch.setattr(_backend, "_cuda_state", lambda: (False, "PyTorch sees no GPU"))
    with pytest.raises(BackendUnavailableError, match='backend "cuda" is not available: PyTorch sees no GPU'):
        _backend.cuda()


def test_an_old_driver_gives_one_warning_and_the_next_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_backend, "_CUDA", FakeCuda(12080))
    with pytest.warns(
        RuntimeWarning, match=r"not used: it was built with CUDA 13\.0, the driver here runs 12\.8 at most"
    ):
        active, reason = cuda_state()
    assert not active
    assert "12.8" in reason
    monkeypatch.setattr(_backend, "_CUDA", FakeCuda(13020))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_state() == (True, "CUDA 13.0")
    monkeypatch.setattr(_backend, "_CUDA", FakeCuda(13020, has_code=False))
    assert cuda_state() == (
        False, "it was not built for compute capability 9.0: TORCH_CUDA_ARCH_LIST chooses the GPUs"
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert cuda_state() == (False, "the GPU is older than compute capability 8.0")


def test_cpp_without_extension_says_why(monkeypatch):
    monkeypatch.setattr(_backend, "_CPP", None)
    monkeypatch.setattr(_backend, "_CPP_REASON", "it is raining")
    assert ops.available_backends()["cpp"] == (False, "it is raining")
    with pytest.raises(BackendUnavailableError, match='backend "cpp" is not available: it is raining'):
        _backend.cpp()


def triton_state(monkeypatch, *, installed=True, interpreted=False, gpu=True, compiler=True, headers=True):
    """Return the state of the Triton backend on such a machine."""
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(_backend.importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(_backend, "TRITON_IS_INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backend.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    monkeypatch.setattr(_backend.Path, "is_file", lambda path: headers)
    return _backend._triton_state.__wrapped__()


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({}, (True, "Triton 3.9.0")),
        ({"installed": False}, (False, "Triton is not installed")),
        ({"gpu": False}, (False, "Triton 3.9.0 needs an NVIDIA GPU that PyTorch sees")),
        ({"gpu": False, "interpreted": True}, (True, "Triton 3.9.0, interpreted: slow, for tests")),
        (
            {"compiler": False},
            (False, "Triton 3.9.0 needs a C compiler: gcc or clang, or what the environment variable CC names"),
        ),
        ({"headers": False}, (False, "Triton 3.9.0 needs Python's headers (python3-dev)")),
    ],
)
def test_triton_says_what_it_lacks(machine, expected, monkeypatch):
    assert triton_state(monkeypatch, **machine) == expected


def test_pythons_headers_where_debian_has_them(monkeypatch, tmp_path):
    """Debian's default scheme names another folder."""
    (tmp_path / "posix_prefix").mkdir()
    (tmp_path / "posix_prefix" / "Python.h").touch()
    monkeypatch.setattr(_backend.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(_backend.sysconfig, "get_path", lambda name, scheme: str(tmp_path / scheme))
    is_file = _backend.Path.is_file
    assert triton_state(monkeypatch)[0]
    monkeypatch.setattr(_backend.Path, "is_file", is_file)
    assert _backend._triton_state.__wrapped__() == (True, "Triton 3.9.0")
    monkeypatch.setattr(_backend.sysconfig, "get_default_scheme", lambda: "other")
    assert not _backend._triton_state.__wrapped__()[0]


def test_triton_without_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(_backend, "backend_state", lambda name: states()[name])
    monkeypatch.setattr(_backend, "TRITON_IS_INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match='"triton" runs on cuda tensors, these are on cpu'):
        choose_backend("triton", CPU, ("torch", "triton"))
    monkeypatch.setattr(_backend, "TRITON_IS_INTERPRETED", True)
    assert choose_backend("triton", CPU, ("torch", "triton")) == "triton"
    assert choose_backend("auto", CPU, ("torch", "triton")) == "torch"


def test_triton_leaves_old_gpus_to_others(monkeypatch):
    monkeypatch.setattr(_backend, "backend_state", lambda name: states(cuda=False)[name])
    monkeypatch.setattr(_backend, "_is_old", lambda device: device.type == "cuda")
    assert choose_backend("auto", CUDA, ("torch", "triton")) == "torch"
    with pytest.raises(BackendUnavailableError, match=r"GPUs of compute capability 8\.0 or more, not cuda"):
        choose_backend("triton", CUDA, ("torch", "triton"))


def test_backends_and_ops_do_not_import_triton():
    """Neither the list of backends nor an op on the CPU needs it."""
    code = (
        "import sys, torch, diffupose, diffupose.commands.env as env, diffupose.ops as ops; env.environment();"
        "ops.philox_normal(0, torch.arange(1), torch.arange(1), 0, 4); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
