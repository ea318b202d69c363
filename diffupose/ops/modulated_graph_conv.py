"""The modulated graph convolution: the public op over the reference, the C++, CUDA and Triton code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffupose import reference
from diffupose.ops import _graph_conv_passes as passes
from diffupose.ops._backend import Backend, choose_backend, is_transformed, name_of

MAX_JOINTS = 64
"""What the C++, CUDA and Triton code takes."""


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
    bfloat16, CUDA and Triton float16 as well; all sum in float32. Under ``torch.autocast`` the product alone is in the
    smaller type. Each pose's result depends on the others through the rounding of the matrix product at most, and no
    sum depends on the number of threads.

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
    unfit = {}
    other = _unfit(x, weight, product, parameters)
    for name, (code, dtypes) in _CODE.items():
        if product not in dtypes:
            *first, last = map(name_of, dtypes)
            unfit[name] = f"this op's {code} takes {', '.join(first)} and {last}, got {product}"
        elif other is not None:
            unfit[name] = f"this op's {code} takes {other}"
    if is_transformed():
        unfit = {name: f"this op's {code} has no rules for torch.func" for name, (code, _) in _CODE.items()}
    # C++ is the faster one wherever it was measured (forward and backward against the reference in one run, two busy
    # cores with AVX-512, torch 2.13): 2.2 times at N = 1024, C = 384 and 1.3 times or more at N = 128, C = 128 in eager
    # mode; 2.0 and 1.15 times under torch.compile; 1.8 and 1.2 times under autocast, compiled 1.1 times.
    chosen = choose_backend(backend, x.device, ("torch", *_CODE), unfit=unfit)
    if chosen == "torch":
        return reference.modulated_graph_conv(x, weight, modulation, adjacency, bias)
    inputs = (x, weight, *parameters)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if differentiated and _are_plain(inputs):
        return _EagerGraphConv.apply(x, weight, modulation, adjacency, bias, product, chosen)
    x, weight = x.to(product), weight.to(product)
    if differentiated:
        return _TracedGraphConv.apply(x, weight, modulation, adjacency, bias, chosen)
    return torch.ops.diffupose.modulated_graph_conv_fwd.default(x, weight, modulation, adjacency, bias, chosen)[0]


def _check(x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [N, J, C_in], got {tuple(x.shape)}")
    joints, channels = x.shape[1:]
    if weight.ndim != 3 or weight.shape[:2] != (2, channels):
        raise ValueError(f"weight must have shape [2, {channels}, C_out], got {tuple(weight.shape)}")
    device, width = x.device, weight.shape[2]
    for name, tensor, shape in (
        ("weight", weight, weight.shape),
        ("modulation", modulation, (joints, width)),
        ("adjacency", adjacency, (joints, joints)),
        ("bias", bias, (width,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if weight.dtype != x.dtype and not _autocasts(x):
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")


def _autocasts(x: Tensor) -> bool:
    """Return whether autocast decides the dtype of the product: not of float64, nor on devices that have none."""
    device = x.device.type
    # torch.compile of PyTorch 2.11 cannot look into the question that is not asked here.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device) and x.dtype != torch.float64


_CODE = {
    "cpp": ("C++ code", (torch.float32, torch.bfloat16)),
    "cuda": ("CUDA code", (torch.float32, torch.float16, torch.bfloat16)),
    "triton": ("Triton kernels", (torch.float32, torch.float16, torch.bfloat16)),
}


def _unfit(x: Tensor, weight: Tensor, product: torch.dtype, parameters: tuple[Tensor, ...]) -> str | None:
    """Return what no code but the reference's takes, as what it does take, or None."""
    dtype = parameters[0].dtype
    if dtype not in (torch.float32, product) or any(tensor.dtype != dtype for tensor in parameters):
        given = ", ".join(name_of(tensor.dtype) for tensor in parameters)
        return f"modulation, adjacency and bias all in float32 or all in {name_of(product)}, got {given}"
    if x.shape[1] > MAX_JOINTS:
        return f"{MAX_JOINTS} joints at most, got {x.shape[1]}"
    if 0 in (x.shape[1], x.shape[2], weight.shape[2]):
        return "at least one joint and one channel"
    return None


def _are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether eager mode alone looks at these tensors: no compiler, mode or subclass."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


class _EagerGraphConv(torch.autograd.Function):
    """Autograd in eager mode, where the host is what small batches wait for: as few calls as it takes.

    The dispatcher is not asked for the raw ops, the weights are put side by side once for both passes, and casts are
    left to what is done anyway. Old style, which costs a third of ``setup_context``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        modulation: Tensor,
        adjacency: Tensor,
        bias: Tensor | None,
        product: torch.dtype,
        backend: str,
    ) -> Tensor:
        features = x.to(product).contiguous()
        weights, factors, matrix = passes.parameters_of(weight, product, modulation, adjacency)
        out, hidden = passes.forward(features, weights, factors, matrix, bias, modulation.dtype, backend)
        ctx.save_for_backward(features, weights, factors, matrix, hidden)
        ctx.dtypes, ctx.backend = (x.dtype, weight.dtype, modulation.dtype), backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable takes its time, and has something to do where gradients are recorded only.
        if torch.is_grad_enabled():
            return once_differentiable(_EagerGraphConv._gradients)(ctx, grad_out)
        return _EagerGraphConv._gradients(ctx, grad_out)

    @staticmethod
    def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        features, weights, factors, matrix, hidden = ctx.saved_tensors
        for_x, for_weight, for_modulation, for_adjacency, for_bias, *_ = ctx.needs_input_grad
        x_dtype, weight_dtype, dtype = ctx.dtypes
        grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias = passes.backward(
            grad_out, features, weights, factors, matrix, hidden,
            x_dtype if for_x else None, weight_dtype if for_weight else None, ctx.backend,
        )  # fmt: skip
        return (
            grad_x,
            grad_weight,
            grad_modulation.to(dtype) if for_modulation else None,
            grad_adjacency.to(dtype) if for_adjacency else None,
            grad_bias.to(dtype) if for_bias else None,
            None,
            None,
        )


class _TracedGraphConv(torch.autograd.Function):
    """Autograd around the raw ops, which compilers and modes know, and casts that they see."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        modulation: Tensor,
        adjacency: Tensor,
        bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        out, hidden = torch.ops.diffupose.modulated_graph_conv_fwd.default(
            x, weight, modulation, adjacency, bias, backend
        )
        ctx.save_for_backward(x, weight, modulation, adjacency, hidden)
        ctx.has_bias, ctx.backend = bias is not None, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, modulation, adjacency, hidden = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias = (
            torch.ops.diffupose.modulated_graph_conv_bwd.default(
                grad_out, x, weight, modulation, adjacency, hidden, needs_x, ctx.backend
            )
        )
        return (
            grad_x if needs_x else None,
            grad_weight,
            grad_modulation,
            grad_adjacency,
            grad_bias if ctx.has_bias else None,
            None,
        )


# --- The raw ops. -----------------------------------------------------------------------------------------------------


def _run_fwd(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    weights, factors, matrix = passes.parameters_of(weight, x.dtype, modulation, adjacency)
    out, hidden = passes.forward(x.contiguous(), weights, factors, matrix, bias, modulation.dtype, backend)
    return out, hidden.view(*x.shape[:2], weights.shape[1])


def _run_bwd(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    hidden: Tensor,
    needs_x: bool,
    backend: str = "cpp",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, factors, matrix = passes.parameters_of(weight, x.dtype, modulation, adjacency)
    grad_x, grad_weight, *sums = passes.backward(
        grad_out, x.contiguous(), weights, factors, matrix, hidden.reshape(-1, hidden.shape[2]),
        x.dtype if needs_x else None, weight.dtype, backend,
    )  # fmt: skip
    assert grad_weight is not None
    grad_modulation, grad_adjacency, grad_bias = (tensor.to(modulation.dtype) for tensor in sums)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def _fwd_fake(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    (poses, joints, _), channels = x.shape, weight.shape[2]
    out = x.new_empty(poses, joints, channels, dtype=torch.promote_types(x.dtype, modulation.dtype))
    return out, x.new_empty(poses, joints, 2 * channels)


def _bwd_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    hidden: Tensor,
    needs_x: bool,
    backend: str = "cpp",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape),
        modulation.new_empty(modulation.shape),
        adjacency.new_empty(adjacency.shape),
        modulation.new_empty(weight.shape[2]),
    )


_lib = torch.library.Library("diffupose", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "modulated_graph_conv_fwd(Tensor x, Tensor weight, Tensor modulation, Tensor adjacency, Tensor? bias, "
    'str backend="cpp") -> (Tensor, Tensor)',
    tags=_TAGS,
)
_lib.define(
    "modulated_graph_conv_bwd(Tensor grad_out, Tensor x, Tensor weight, Tensor modulation, Tensor adjacency, "
    'Tensor hidden, bool needs_x, str backend="cpp") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    tags=_TAGS,
)
for _device in ("CPU", "CUDA"):
    _lib.impl("modulated_graph_conv_fwd", _run_fwd, _device)
    _lib.impl("modulated_graph_conv_bwd", _run_bwd, _device)
torch.library.register_fake("diffupose::modulated_graph_conv_fwd", _fwd_fake, lib=_lib)
torch.library.register_fake("diffupose::modulated_graph_conv_bwd", _bwd_fake, lib=_lib)
