"""The modulated graph convolution: the public op over all backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffupose import reference
from diffupose.ops import _graph_conv_passes as passes
from diffupose.ops._backend import Backend, choose_backend, is_transformed, name_of
from diffupose.ops._common import CODE, check_device, check_shape, register, unfit_for
from diffupose.ops._graph_conv_autograd import EagerGraphConv, TracedGraphConv

MAX_JOINTS = 64
"""The most joints that the C++, CUDA and Triton code takes."""


def modulated_graph_conv(
    x: Tensor,
    weight: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return ``diag(A) (M * x W0) + offdiag(A) (M * x W1) + bias``.

    Column c of a weight scaled by ``modulation[j, c]`` is joint j's own, unshared weight. C++ takes float32 and
    bfloat16, CUDA and Triton also float16; all sum in float32. Under ``torch.autocast`` only the matrix product is in
    the smaller type. Other poses of a batch change a pose's result only by the rounding of the matrix product. No sum
    depends on the number of threads.

    Args:
        x: Features of shape ``[N, J, C_in]``.
        weight: ``[2, C_in, C_out]``: 0 for the joint itself, 1 for its neighbours.
        modulation: ``[J, C_out]``.
        adjacency: ``[J, J]``, already modulated and symmetrised.
        bias: ``[C_out]`` or None.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; None takes the environment variable
            DIFFUPOSE_BACKEND, or else ``"auto"``. Only ``"torch"`` can be differentiated twice.

    Returns:
        Features of shape ``[N, J, C_out]``.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
        BackendUnavailableError: If the named backend cannot run here or not take these inputs.

    Example:
        >>> x, weight = torch.randn(5, 17, 2), torch.randn(2, 2, 8)
        >>> modulated_graph_conv(x, weight, torch.ones(17, 8), torch.eye(17)).shape
        torch.Size([5, 17, 8])

    Reference:
        DiffuPose eq. 6-7; Zou and Tang 2021, "Modulated graph convolutional network for 3D human pose estimation".
    """
    _check(x, weight, modulation, adjacency, bias)
    product = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
    parameters = (modulation, adjacency) if bias is None else (modulation, adjacency, bias)
    unfit = _unfit(x, weight, product, parameters)
    # C++ was faster than the reference wherever it was measured (forward and backward, two busy cores with AVX-512,
    # torch 2.13): in eager mode 2.2 times at N = 1024, C = 384 and 1.3 times or more at N = 128, C = 128; under
    # torch.compile 2.0 and 1.15 times; under autocast 1.8 and 1.2 times, compiled 1.1 times.
    chosen = choose_backend(backend, x.device, ("torch", *CODE), unfit=unfit)
    if chosen == "torch":
        return reference.modulated_graph_conv(x, weight, modulation, adjacency, bias)
    inputs = (x, weight, *parameters)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if differentiated and _are_plain(inputs):
        return EagerGraphConv.apply(x, weight, modulation, adjacency, bias, product, chosen)
    x, weight = x.to(product), weight.to(product)
    if differentiated:
        return TracedGraphConv.apply(x, weight, modulation, adjacency, bias, chosen)
    return torch.ops.diffupose.modulated_graph_conv_fwd.default(x, weight, modulation, adjacency, bias, chosen)[0]


def _check(x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [N, J, C_in], got {tuple(x.shape)}")
    joints, channels = x.shape[1:]
    if weight.ndim != 3 or weight.shape[:2] != (2, channels):
        raise ValueError(f"weight must have shape [2, {channels}, C_out], got {tuple(weight.shape)}")
    width, device = weight.shape[2], x.device
    for name, tensor, shape in (
        ("weight", weight, (2, channels, width)),
        ("modulation", modulation, (joints, width)),
        ("adjacency", adjacency, (joints, joints)),
        ("bias", bias, (width,)),
    ):
        if tensor is None:
            continue
        check_shape(name, tensor, shape)
        check_device(name, tensor, "x", device)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if weight.dtype != x.dtype and not _autocasts(x):
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")


def _autocasts(x: Tensor) -> bool:
    """Return whether autocast chooses the dtype of the product: not for float64, nor on devices without autocast."""
    device = x.device.type
    # torch.compile of PyTorch 2.11 cannot trace is_autocast_available, so the CPU and GPUs do not ask it.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device) and x.dtype != torch.float64


_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}


def _unfit(x: Tensor, weight: Tensor, product: torch.dtype, parameters: tuple[Tensor, ...]) -> dict[str, str]:
    """Return which backends cannot take these inputs, and why."""
    if is_transformed():
        return unfit_for("has no rules for torch.func")
    unfit: dict[str, str] = {}
    (_, joints, channels), dtype = x.shape, parameters[0].dtype
    if dtype not in (torch.float32, product) or any(tensor.dtype != dtype for tensor in parameters):
        given = ", ".join(name_of(tensor.dtype) for tensor in parameters)
        takes = f"modulation, adjacency and bias all in float32 or all in {name_of(product)}, got {given}"
        unfit = unfit_for(f"takes {takes}")
    elif joints > MAX_JOINTS:
        unfit = unfit_for(f"takes {MAX_JOINTS} joints at most, got {joints}")
    elif 0 in (joints, channels, weight.shape[2]):
        unfit = unfit_for("takes at least one joint and one channel")
    for name, dtypes in _DTYPES.items():
        if product not in dtypes:
            *first, last = map(name_of, dtypes)
            unfit |= unfit_for(f"takes {', '.join(first)} and {last}, got {product}", (name,))
    return unfit


def _are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether no compiler, mode or tensor subclass sees these tensors."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


# --- The raw ops. -----------------------------------------------------------------------------------------------------


def _run_fwd(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    parameters = passes.prepare(weight, x.dtype, modulation, adjacency)
    out, hidden = passes.forward(x.contiguous(), parameters, bias, modulation.dtype, backend)
    return out, hidden.view(*x.shape[:2], weight.shape[2] * 2)


def _run_bwd(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    hidden: Tensor,
    needs_x: bool,
    backend: str = "cpp",
) -> tuple[Tensor, ...]:
    grad_x, grad_weight, *sums = passes.backward(
        grad_out, x.contiguous(), passes.prepare(weight, x.dtype, modulation, adjacency),
        hidden.reshape(-1, hidden.shape[2]), (x.dtype if needs_x else None, weight.dtype), backend,
    )  # fmt: skip
    assert grad_weight is not None
    grad_modulation, grad_adjacency, grad_bias = (tensor.to(modulation.dtype) for tensor in sums)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def _fwd_fake(x: Tensor, weight: Tensor, modulation: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    poses, joints, channels = *x.shape[:2], weight.shape[2]
    out = x.new_empty(poses, joints, channels, dtype=torch.promote_types(x.dtype, modulation.dtype))
    return out, x.new_empty(poses, joints, 2 * channels)


def _bwd_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs_x = rest[0]
    grads = (tensor.new_empty(tensor.shape) for tensor in (weight, modulation, adjacency))
    return x.new_empty(x.shape if needs_x else (0,)), *grads, modulation.new_empty(weight.shape[2])


register(
    "modulated_graph_conv_fwd(Tensor x, Tensor weight, Tensor modulation, Tensor adjacency, Tensor? bias, "
    'str backend="cpp") -> (Tensor, Tensor)',
    _run_fwd,
    _fwd_fake,
)
register(
    "modulated_graph_conv_bwd(Tensor grad_out, Tensor x, Tensor weight, Tensor modulation, Tensor adjacency, "
    'Tensor hidden, bool needs_x, str backend="cpp") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _run_bwd,
    _bwd_fake,
)
