"""Which code runs an op: the argument, then the environment variable DIFFUPOSE_BACKEND, then the fixed order."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch  # before the extension, so that both use the OpenMP runtime that torch brings
from torch import Tensor
from torch.autograd import forward_ad

from diffupose._source_hash import source_hash
from diffupose.errors import BackendUnavailableError

Backend = Literal["auto", "torch", "cpp", "cuda", "triton"]

# The order of "auto" on each kind of device; other devices have only the reference.
_AUTO_ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}
_NAMES = ("torch", "cpp", "cuda", "triton")
_DEVICE_OF = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
_FROM_ENVIRONMENT = os.environ.get("DIFFUPOSE_BACKEND") or "auto"

# ``setup.py`` writes these into the package if it builds no extension.
_PACKAGE = Path(__file__).resolve().parents[1]
_REASONS = {"_C": "_no_extension.txt", "_cuda": "_no_cuda.txt"}

# Triton reads this variable when a kernel is defined. Set later it would do nothing, or harm.
TRITON_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton kernels run in Triton's interpreter: slowly, and on any device."""

SourceState = Literal["no extension", "no sources", "match", "changed"]


def _reason_of_the_build(name: str) -> str:
    """Return why ``setup.py`` did not build an extension, as the end of a sentence."""
    try:
        return ": " + (_PACKAGE / _REASONS[name]).read_text(encoding="utf-8").strip()
    except OSError:  # no record: the package was not built, or the file was deleted
        return ""


def _load(name: str, language: str) -> tuple[ModuleType | None, SourceState, str]:
    """Return an extension or None, how it compares with its sources, and why it cannot be used."""
    try:
        module = importlib.import_module(f"diffupose.{name}")
    except ModuleNotFoundError:
        return None, "no extension", f"diffupose was built without its {language} extension{_reason_of_the_build(name)}"
    except ImportError as error:
        return None, "no extension", f"the {language} extension does not load: {error}"
    csrc = _PACKAGE.parent / "csrc"
    if not (csrc / "bind" / "module.cpp").is_file():  # an ordinary install has no sources
        return module, "no sources", ""
    if source_hash(csrc) == module.source_hash():
        return module, "match", ""
    reason = f"the {language} sources changed since the build: run pip install -e . again"
    warnings.warn(f"diffupose: {reason}", RuntimeWarning, stacklevel=2)
    return None, "changed", reason


_CPP, SOURCE_STATE, _CPP_REASON = _load("_C", "C++")
_CUDA, _, _CUDA_REASON = _load("_cuda", "CUDA")


def cpp() -> ModuleType:
    """Return the C++ extension.

    Raises:
        BackendUnavailableError: If it is missing or cannot be used; the message says why.
    """
    if _CPP is None:
        raise BackendUnavailableError(f'backend "cpp" is not available: {_CPP_REASON}')
    return _CPP


def cuda() -> ModuleType:
    """Return the CUDA extension.

    Raises:
        BackendUnavailableError: If it is missing or cannot be used; the message says why.
    """
    active, reason = _cuda_state()
    if not active:
        raise BackendUnavailableError(f'backend "cuda" is not available: {reason}')
    assert _CUDA is not None
    return _CUDA


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels run on a tensor's GPU; it costs little if that is the current one."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def stream_of(tensor: Tensor) -> int:
    """Return the handle of the current stream of a tensor's device."""
    # Triton and torch.compile call this too; torch.cuda.current_stream makes an object first.
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode AD is active: the kernels have no rules for them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name for the extensions and for messages: ``"float32"``, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _cpp_state() -> tuple[bool, str]:
    if _CPP is None:
        return False, _CPP_REASON
    return True, "C++ with OpenMP" if _CPP.has_openmp() else "C++ without OpenMP, on one thread"


@functools.cache
def _cuda_state() -> tuple[bool, str]:
    """Return whether the CUDA extension runs here, and its version or why it does not."""
    if _CUDA is None:
        return False, _CUDA_REASON
    if not torch.cuda.is_available():
        return False, "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return False, "the GPU is older than compute capability 8.0"
    runtime, driver = _CUDA.runtime_version(), _CUDA.driver_version()
    if driver // 1000 < runtime // 1000:  # within a major version an older driver runs newer code
        reason = f"it was built with CUDA {_version(runtime)}, the driver here runs {_version(driver)} at most"
        warnings.warn(f"diffupose: the CUDA extension is not used: {reason}", RuntimeWarning, stacklevel=3)
        return False, reason
    if not _CUDA.has_code():
        major, minor = torch.cuda.get_device_capability()
        return False, f"it was not built for compute capability {major}.{minor}: TORCH_CUDA_ARCH_LIST chooses the GPUs"
    return True, f"CUDA {_version(runtime)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _triton_state() -> tuple[bool, str]:
    """Return whether Triton kernels can run here, and its version or why not. Triton is not imported."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    try:
        name = f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # some builds of torch install it under another name
        name = "Triton"
    if TRITON_IS_INTERPRETED:
        return True, f"{name}, interpreted: slow, for tests"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False, f"{name} needs an NVIDIA GPU that PyTorch sees"
    # Triton compiles the code that launches a kernel.
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return False, f"{name} needs a C compiler: gcc or clang, or what the environment variable CC names"
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names an empty folder; its headers are where Python's usual scheme says.
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(include, "Python.h").is_file():
        return False, f"{name} needs Python's headers (python3-dev)"
    return True, name


def _is_old(device: torch.device) -> bool:
    """Return whether a GPU is one that Triton does not support."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def available_backends() -> dict[str, tuple[bool, str]]:
    """Return for each backend whether it can run here, and its version or why it cannot.

    Example:
        >>> available_backends()["torch"][0]
        True
    """
    return {name: backend_state(name) for name in _NAMES}


def backend_state(name: str) -> tuple[bool, str]:
    """Return the same for one backend. Others are not asked: that may start a GPU, which a forked process cannot."""
    if name == "cpp":
        return _cpp_state()
    if name == "cuda":
        return _cuda_state()
    if name == "triton":
        return _triton_state()
    return True, f"PyTorch {torch.__version__}"


# torch.compile cannot trace these questions to the extensions and the driver. The attribute is that of
# torch.compiler.assume_constant_result, whose call would import the whole compiler and Triton.
backend_state._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(
    requested: str | None,
    device: torch.device,
    implemented: Collection[str],
    *,
    unfit: Mapping[str, str] | None = None,
    only_named: Collection[str] = (),
) -> str:
    """Return the backend that runs an op on ``device``: the named one, or the first one that can.

    Args:
        requested: The caller's argument; None takes DIFFUPOSE_BACKEND as it was at import, or ``"auto"``.
        device: The device of the inputs.
        implemented: The backends of the op.
        unfit: Backends that cannot take these inputs, and why.
        only_named: Backends that ``"auto"`` does not take for these inputs.

    Raises:
        ValueError: If there is no backend of that name.
        BackendUnavailableError: If the named backend cannot run; the message says why.
    """
    name = _FROM_ENVIRONMENT if requested is None else requested
    kind = device.type
    if name != "auto" and name not in _NAMES:
        source = "the environment variable DIFFUPOSE_BACKEND" if requested is None else "backend"
        raise ValueError(f"{source} must be one of auto, {', '.join(_NAMES)}; got {name!r}")
    unfit = unfit or {}
    if kind == "cuda" and _is_old(device):
        unfit = {**unfit, "triton": f"Triton takes GPUs of compute capability 8.0 or more, not {device}"}
    if name == "auto":
        for candidate in _AUTO_ORDER.get(kind, ("torch",)):
            left_out = candidate not in implemented or candidate in unfit or candidate in only_named
            if not left_out and backend_state(candidate)[0]:
                return candidate
        raise BackendUnavailableError(f"none of the backends of this op, {', '.join(implemented)}, runs on {device}")
    active, reason = backend_state(name)
    if not active:
        raise BackendUnavailableError(f'backend "{name}" is not available: {reason}')
    if name not in implemented:
        raise BackendUnavailableError(f'backend "{name}" is not available: this op has {", ".join(implemented)} only')
    if name in unfit:
        raise BackendUnavailableError(f'backend "{name}" is not available: {unfit[name]}')
    anywhere = name == "triton" and TRITON_IS_INTERPRETED
    if _DEVICE_OF.get(name, kind) != kind and not anywhere:
        raise BackendUnavailableError(f'backend "{name}" runs on {_DEVICE_OF[name]} tensors, these are on {device}')
    return name
