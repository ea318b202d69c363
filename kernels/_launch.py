"""Launching kernels, and what their launchers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, enable_fp_fusion: bool, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, on that device's current stream.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Programs along each axis; if there are none, nothing is launched.
        arguments: Tensors, numbers and None, in the kernel's order.
        enable_fp_fusion: Whether a product and a sum may become one operation that rounds once. It has no default here
            because Triton's default changes.
        options: Constants of the kernel by name, and ``num_warps``.
    """
    if 0 in grid:
        return
    device = arguments[0].device
    options["enable_fp_fusion"] = enable_fp_fusion
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def generation_of(device: torch.device) -> int:
    """Return the major compute capability of an NVIDIA GPU, 9 for Hopper; 0 for other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def is_large(*tensors: Tensor | None) -> bool:
    """Return whether an offset between two numbers of one of the tensors needs more than 32 bits."""
    # Whole blocks compute addresses, also past the end.
    most = 2**31 - 2**16
    return any(
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) > most
        for tensor in tensors
        if tensor is not None and tensor.numel()
    )


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
