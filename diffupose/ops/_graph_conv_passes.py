"""The passes of the modulated graph convolution: products by the best GEMM there is, and what follows them by backend.

Both autograd functions and the raw ops of ``modulated_graph_conv.py`` are made of ``forward`` and ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffupose.ops._backend import cpp, cuda, name_of, on_device, stream_of


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product ``a b``."""
    # oneDNN's product in float32, which torch.mm does not take: on an AMD EPYC with AVX-512, two threads, it was 1.4
    # to 2.3 times as fast as torch.mm (MKL) for the three products here, 2176 x 128 x 256 and 17408 x 384 x 768.
    device = a.device.type
    on_cpu = device == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if a.dtype == torch.float32 and on_cpu:
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    # Turning it off takes three times as long as asking.
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != a.dtype:
        with torch.autocast(device, enabled=False):
            return torch.mm(a, b)
    return torch.mm(a, b)


def multiply_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product in a dtype, float32 sums of 16 bits as they are."""
    if a.dtype == dtype:
        return multiply(a, b)
    if a.is_cuda and dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        return torch.mm(a, b, out_dtype=dtype)
    return multiply(a, b).to(dtype)


def parameters_of(
    weight: Tensor, product: torch.dtype, modulation: Tensor, adjacency: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights side by side, ``[C_in, 2 C_out]``, by one copy, and the others in float32, contiguous."""
    rows = weight.transpose(0, 1).to(product, memory_format=torch.contiguous_format)
    weights = rows.reshape(weight.shape[1], 2 * weight.shape[2])
    return weights, modulation.float().contiguous(), adjacency.float().contiguous()


def forward(
    features: Tensor,  # x in the dtype of the product, contiguous
    weights: Tensor,  # of parameters_of, as are the next two
    factors: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,  # of the modulation as it was given
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the result ``[N, J, C_out]`` and the product ``[N J, 2 C_out]``."""
    (poses, joints, channels_in), channels = features.shape, factors.shape[1]
    out = features.new_empty((poses, joints, channels), dtype=torch.promote_types(features.dtype, dtype))
    if poses == 0:
        return out, features.new_empty((0, 2 * channels))
    hidden = multiply(features.view(poses * joints, channels_in), weights)
    _FORWARD[backend](hidden, factors, matrix, None if bias is None else bias.float().contiguous(), out)
    return out, hidden


def backward(
    grad_out: Tensor,
    features: Tensor,  # as in forward, and so are the next three
    weights: Tensor,
    factors: Tensor,
    matrix: Tensor,
    hidden: Tensor,
    x_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients of x and weight in their dtypes, None where there is none, and the others in float32."""
    (poses, joints, channels_in), channels = features.shape, factors.shape[1]
    if poses == 0:
        return (
            None if x_dtype is None else features.new_empty((0, joints, channels_in), dtype=x_dtype),
            None if weight_dtype is None else features.new_zeros((2, channels_in, channels), dtype=weight_dtype),
            torch.zeros_like(factors),
            torch.zeros_like(matrix),
            factors.new_zeros(channels),
        )
    grad_hidden, grad_modulation, grad_adjacency, grad_bias = _BACKWARD[backend](
        grad_out.contiguous(), hidden, factors, matrix
    )
    grad_x = grad_weight = None
    if x_dtype is not None:
        grad_x = multiply_to(grad_hidden, weights.t(), x_dtype).view(poses, joints, channels_in)
    if weight_dtype is not None:
        rows = features.view(poses * joints, channels_in)
        beside = multiply_to(rows.t(), grad_hidden, weight_dtype)  # [C_in, 2 C_out]
        grad_weight = beside.view(channels_in, 2, channels).transpose(0, 1).contiguous()
    return grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def fwd_cpp(hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor) -> None:
    cpp().modulated_graph_conv_fwd(
        hidden=hidden.data_ptr(),
        hidden_bfloat16=hidden.dtype == torch.bfloat16,
        modulation=modulation.data_ptr(),
        adjacency=adjacency.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_bfloat16=out.dtype == torch.bfloat16,
        num_poses=out.shape[0],
        num_joints=out.shape[1],
        channels=out.shape[2],
        num_threads=torch.get_num_threads(),
    )


def fwd_cuda(hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor) -> None:
    with on_device(hidden):
        cuda().modulated_graph_conv_fwd(
            hidden=hidden.data_ptr(),
            dtype=name_of(hidden.dtype),
            modulation=modulation.data_ptr(),
            adjacency=adjacency.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            out_dtype=name_of(out.dtype),
            num_poses=out.shape[0],
            num_joints=out.shape[1],
            channels=out.shape[2],
            stream=stream_of(hidden),
        )


def fwd_triton(hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_fwd

    modulated_graph_conv_fwd(hidden, modulation, adjacency, bias, out)


# What follows the product; the last argument takes the result.
_FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]]
_FORWARD = {"cpp": fwd_cpp, "cuda": fwd_cuda, "triton": fwd_triton}


def _empty_grads(hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> dict[str, Tensor]:
    return {
        "grad_hidden": torch.empty_like(hidden),
        "grad_modulation": torch.empty_like(modulation),
        "grad_adjacency": torch.empty_like(adjacency),
        "grad_bias": modulation.new_empty(modulation.shape[1]),
    }


def bwd_cpp(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    grads = _empty_grads(hidden, modulation, adjacency)
    cpp().modulated_graph_conv_bwd(
        grad_out=grad_out.data_ptr(),
        out_bfloat16=grad_out.dtype == torch.bfloat16,
        hidden=hidden.data_ptr(),
        hidden_bfloat16=hidden.dtype == torch.bfloat16,
        modulation=modulation.data_ptr(),
        adjacency=adjacency.data_ptr(),
        **{name: grad.data_ptr() for name, grad in grads.items()},
        num_poses=grad_out.shape[0],
        num_joints=grad_out.shape[1],
        channels=grad_out.shape[2],
        num_threads=torch.get_num_threads(),
    )
    return tuple(grads.values())


def bwd_cuda(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    grads = _empty_grads(hidden, modulation, adjacency)
    poses, joints, channels = grad_out.shape
    sizes = {"num_poses": poses, "num_joints": joints, "channels": channels}
    workspace = modulation.new_empty(cuda().modulated_graph_conv_bwd_workspace(**sizes))
    with on_device(hidden):
        cuda().modulated_graph_conv_bwd(
            grad_out=grad_out.data_ptr(),
            out_dtype=name_of(grad_out.dtype),
            hidden=hidden.data_ptr(),
            dtype=name_of(hidden.dtype),
            modulation=modulation.data_ptr(),
            adjacency=adjacency.data_ptr(),
            **{name: grad.data_ptr() for name, grad in grads.items()},
            workspace=workspace.data_ptr(),
            **sizes,
            stream=stream_of(hidden),
        )
    return tuple(grads.values())


def bwd_triton(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_bwd

    return modulated_graph_conv_bwd(grad_out, hidden, modulation, adjacency)


# The gradients of the product, modulation, adjacency and bias.
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]]
_BACKWARD = {"cpp": bwd_cpp, "cuda": bwd_cuda, "triton": bwd_triton}
