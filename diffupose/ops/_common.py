"""What the files of the ops share: checks of tensors, calls of the extensions, registration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diffupose.ops._backend import cpp, cuda, on_device, stream_of

CODE = {"cpp": "C++ code", "cuda": "CUDA code", "triton": "Triton kernel"}
"""What messages call the code of a backend."""

_library = torch.library.Library("diffupose", "FRAGMENT")


def check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """Raise ``ValueError`` unless a tensor is on the device of another one, which messages call ``other``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {other}, {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless a tensor has one of the shapes."""
    if tensor.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def unfit_for(reason: str, backends: Iterable[str] = CODE) -> dict[str, str]:
    """Return the backends with the reason why their code cannot take these inputs, as ``choose_backend`` wants it."""
    return {name: f"this op's {CODE[name]} {reason}" for name in backends}


def packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, contiguous."""
    # Tensor.to costs more than the question, even where it does nothing.
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def address(tensor: Tensor | None) -> int:
    """Return a tensor's address as the extensions take it: 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def call_extension(backend: str, op: str, home: Tensor, arguments: dict[str, Any]) -> None:
    """Call an extension's function: in C++ on torch's threads, in CUDA on the current stream of a tensor's GPU.

    Args:
        backend: ``"cpp"`` or ``"cuda"``.
        op: The name of the function.
        home: A tensor on the device where it runs.
        arguments: The function's arguments by name, tensors as addresses. ``num_threads`` or ``stream`` is added.
    """
    if backend == "cpp":
        arguments["num_threads"] = torch.get_num_threads()
        getattr(cpp(), op)(**arguments)
        return
    arguments["stream"] = stream_of(home)
    with on_device(home):
        getattr(cuda(), op)(**arguments)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.diffupose.<name>`` for CPU and CUDA tensors; ``fake`` gives the shapes of its results."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"diffupose::{name}", fake, lib=_library)
