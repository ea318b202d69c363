"""The forward and backward pass of the modulated graph convolution.

Both autograd functions and the raw ops of ``modulated_graph_conv.py`` call ``forward`` and ``backward``. These consist
of matrix products by torch or oneDNN and of a backend's code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffupose.ops._backend import cuda, name_of
from diffupose.ops._common import address, call_extension


class Parameters(NamedTuple):
    """Parameters as the passes take them, contiguous."""

    weight: Tensor
    """Both weights side by side, ``[C_in, 2 C_out]``, in the dtype of the product."""
    modulation: Tensor
    """``[J, C_out]``, float32."""
    adjacency: Tensor
    """``[J, J]``, float32."""


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product ``a b``."""
    # In float32 this is oneDNN's product, which torch.mm does not use. On an AMD EPYC with AVX-512, two threads, it was
    # 1.4 to 2.3 times as fast as torch.mm (MKL) for the three products here, 2176 x 128 x 256 and 17408 x 384 x 768.
    device = a.device.type
    on_cpu = device == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if a.dtype == torch.float32 and on_cpu:
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    # Turning autocast off takes three times as long as asking for it.
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != a.dtype:
        with torch.autocast(device, enabled=False):
            return torch.mm(a, b)
    return torch.mm(a, b)


def multiply_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product in a dtype; float32 sums of 16-bit products are not rounded to 16 bits first."""
    if a.dtype == dtype:
        return multiply(a, b)
    if a.is_cuda and dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        return torch.mm(a, b, out_dtype=dtype)
    return multiply(a, b).to(dtype)


def prepare(weight: Tensor, product: torch.dtype, modulation: Tensor, adjacency: Tensor) -> Parameters:
    """Return the parameters as the passes take them, with one copy of the weights; ``product`` is its dtype."""
    rows = weight.transpose(0, 1).to(product, memory_format=torch.contiguous_format)
    weights = rows.reshape(weight.shape[1], 2 * weight.shape[2])
    return Parameters(weights, modulation.float().contiguous(), adjacency.float().contiguous())


def forward(
    features: Tensor,  # x in the dtype of the product, contiguous
    parameters: Parameters,
    bias: Tensor | None,
    dtype: torch.dtype,  # of the modulation as it was given
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the result ``[N, J, C_out]`` and the product ``[N J, 2 C_out]``."""
    weight, modulation, adjacency = parameters
    (poses, joints, channels_in), channels = features.shape, modulation.shape[1]
    out = features.new_empty((poses, joints, channels), dtype=torch.promote_types(features.dtype, dtype))
    if poses == 0:
        return out, features.new_empty((0, 2 * channels))
    hidden = multiply(features.view(poses * joints, channels_in), weight)
    FORWARD[backend](hidden, modulation, adjacency, None if bias is None else bias.float().contiguous(), out)
    return out, hidden


def backward(
    grad_out: Tensor,
    features: Tensor,  # as in forward
    parameters: Parameters,
    hidden: Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],  # of the gradients of x and weight; None leaves one out
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients of x and weight in their dtypes, and those of modulation, adjacency and bias in float32."""
    weight, modulation, adjacency = parameters
    (poses, joints, channels_in), channels = features.shape, modulation.shape[1]
    x_dtype, weight_dtype = dtypes
    if poses == 0:
        return (
            None if x_dtype is None else features.new_empty((0, joints, channels_in), dtype=x_dtype),
            None if weight_dtype is None else features.new_zeros((2, channels_in, channels), dtype=weight_dtype),
            torch.zeros_like(modulation),
            torch.zeros_like(adjacency),
            modulation.new_zeros(channels),
        )
    grad_hidden, *sums = BACKWARD[backend](grad_out.contiguous(), hidden, modulation, adjacency)
    grad_modulation, grad_adjacency, grad_bias = sums
    grad_x = grad_weight = None
    if x_dtype is not None:
        grad_x = multiply_to(grad_hidden, weight.t(), x_dtype).view(poses, joints, channels_in)
    if weight_dtype is not None:
        rows = features.view(poses * joints, channels_in)
        side_by_side = multiply_to(rows.t(), grad_hidden, weight_dtype)  # [C_in, 2 C_out]
        grad_weight = side_by_side.view(channels_in, 2, channels).transpose(0, 1).contiguous()
    return grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def _dtypes_for(backend: str, hidden: Tensor, out: Tensor) -> dict[str, Any]:
    if backend == "cpp":
        return {"hidden_bfloat16": hidden.dtype == torch.bfloat16, "out_bfloat16": out.dtype == torch.bfloat16}
    return {"dtype": name_of(hidden.dtype), "out_dtype": name_of(out.dtype)}


def _forward_extension(
    backend: str, hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    poses, joints, channels = out.shape
    arguments: dict[str, Any] = {
        "hidden": hidden.data_ptr(),
        "modulation": modulation.data_ptr(),
        "adjacency": adjacency.data_ptr(),
        "bias": address(bias),
        "out": out.data_ptr(),
        "num_poses": poses,
        "num_joints": joints,
        "channels": channels,
        **_dtypes_for(backend, hidden, out),
    }
    call_extension(backend, "modulated_graph_conv_fwd", hidden, arguments)


def _forward_triton(*arguments: Any) -> None:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_fwd

    modulated_graph_conv_fwd(*arguments)


FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]] = {
    "cpp": partial(_forward_extension, "cpp"),
    "cuda": partial(_forward_extension, "cuda"),
    "triton": _forward_triton,
}
"""What follows the product, of (hidden, modulation, adjacency, bias, out); it fills ``out``."""


def _backward_extension(
    backend: str, grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor
) -> tuple[Tensor, ...]:
    poses, joints, channels = grad_out.shape
    sizes = {"num_poses": poses, "num_joints": joints, "channels": channels}
    grads = {
        "grad_hidden": torch.empty_like(hidden),
        "grad_modulation": torch.empty_like(modulation),
        "grad_adjacency": torch.empty_like(adjacency),
        "grad_bias": modulation.new_empty(channels),
    }
    arguments: dict[str, Any] = {
        "grad_out": grad_out.data_ptr(),
        "hidden": hidden.data_ptr(),
        "modulation": modulation.data_ptr(),
        "adjacency": adjacency.data_ptr(),
        **{name: grad.data_ptr() for name, grad in grads.items()},
        **sizes,
        **_dtypes_for(backend, hidden, grad_out),
    }
    if backend == "cuda":
        workspace = modulation.new_empty(cuda().modulated_graph_conv_bwd_workspace(**sizes))
        arguments["workspace"] = workspace.data_ptr()
    call_extension(backend, "modulated_graph_conv_bwd", hidden, arguments)
    return tuple(grads.values())


def _backward_triton(*arguments: Tensor) -> tuple[Tensor, ...]:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_bwd

    return modulated_graph_conv_bwd(*arguments)


BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "cpp": partial(_backward_extension, "cpp"),
    "cuda": partial(_backward_extension, "cuda"),
    "triton": _backward_triton,
}
"""The gradients of hidden, modulation, adjacency and bias, of (grad_out, hidden, modulation, adjacency)."""
