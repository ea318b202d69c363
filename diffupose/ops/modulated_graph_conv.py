"""The modulated graph convolution: the public op over the reference, the C++, CUDA and Triton code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffupose import reference
from diffupose.ops._backend import Backend, choose_backend, cpp, cuda, on_device, stream_of

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
            *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            unfit[name] = f"this op's {code} takes {', '.join(first)} and {last}, got {product}"
        elif other is not None:
            unfit[name] = f"this op's {code} takes {other}"
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
        return f"modulation, adjacency and bias all in float32 or all in {product}"
    if x.shape[1] > MAX_JOINTS:
        return f"{MAX_JOINTS} joints at most, got {x.shape[1]}"
    if 0 in (x.shape[1], x.shape[2], weight.shape[2]):
        return "at least one joint and one channel"
    return None


def _are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether eager mode alone looks at these tensors: no compiler, mode, transform or subclass."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
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
        weights, factors, matrix = _parameters(weight, product, modulation, adjacency)
        out, hidden = _forward(features, weights, factors, matrix, bias, modulation.dtype, backend)
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
        grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias = _backward(
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


def _multiply(a: Tensor, b: Tensor) -> Tensor:
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


def _multiply_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product in a dtype, float32 sums of 16 bits as they are."""
    if a.dtype == dtype:
        return _multiply(a, b)
    if a.is_cuda and dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        return torch.mm(a, b, out_dtype=dtype)
    return _multiply(a, b).to(dtype)


def _parameters(
    weight: Tensor, product: torch.dtype, modulation: Tensor, adjacency: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights side by side, ``[C_in, 2 C_out]``, by one copy, and the others in float32, contiguous."""
    rows = weight.transpose(0, 1).to(product, memory_format=torch.contiguous_format)
    weights = rows.reshape(weight.shape[1], 2 * weight.shape[2])
    return weights, modulation.float().contiguous(), adjacency.float().contiguous()


def _forward(
    features: Tensor,  # x in the dtype of the product, contiguous
    weights: Tensor,  # of _parameters, as are the next two
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
    hidden = _multiply(features.view(poses * joints, channels_in), weights)
    _FORWARD[backend](hidden, factors, matrix, None if bias is None else bias.float().contiguous(), out)
    return out, hidden


def _backward(
    grad_out: Tensor,
    features: Tensor,  # as in _forward, and so are the next three
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
        grad_x = _multiply_to(grad_hidden, weights.t(), x_dtype).view(poses, joints, channels_in)
    if weight_dtype is not None:
        rows = features.view(poses * joints, channels_in)
        beside = _multiply_to(rows.t(), grad_hidden, weight_dtype)  # [C_in, 2 C_out]
        grad_weight = beside.view(channels_in, 2, channels).transpose(0, 1).contiguous()
    return grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def _run_fwd(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    weights, factors, matrix = _parameters(weight, x.dtype, modulation, adjacency)
    out, hidden = _forward(x.contiguous(), weights, factors, matrix, bias, modulation.dtype, backend)
    return out, hidden.view(*x.shape[:2], weights.shape[1])


def _fwd_cpp(hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor) -> None:
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


def _fwd_cuda(
    hidden: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: Literal["none", "relu", "gelu"] = "none",
    residual: Tensor | None = None,
    film: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write what follows the product to ``out``, and in inference what follows the convolution, all in one pass.

        y = activation(scale y + shift) + residual;  y = silu(film[0] y + film[1])

    Args:
        hidden: The product, ``[N J, 2 C_out]``.
        modulation: ``[J, C_out]``, float32 and contiguous, as are the next two.
        adjacency: ``[J, J]``.
        bias: ``[C_out]`` or None.
        out: ``[N, J, C_out]``, in the dtype of ``hidden`` or float32.
        scale_shift: A folded BatchNorm, ``[C_out]`` each, float32.
        activation: What comes next.
        residual: ``[N, J, C_out]``, like ``out``, which it may be.
        film: A time block, ``[C_out]`` each, float32.
    """
    scale, shift = scale_shift or (None, None)
    film_scale, film_shift = film or (None, None)
    with on_device(hidden):
        cuda().modulated_graph_conv_fwd(
            hidden=hidden.data_ptr(),
            dtype=_name(hidden.dtype),
            modulation=modulation.data_ptr(),
            adjacency=adjacency.data_ptr(),
            bias=_address(bias),
            scale=_address(scale),
            shift=_address(shift),
            activation=activation,
            residual=_address(residual),
            film_scale=_address(film_scale),
            film_shift=_address(film_shift),
            out=out.data_ptr(),
            out_dtype=_name(out.dtype),
            num_poses=out.shape[0],
            num_joints=out.shape[1],
            channels=out.shape[2],
            stream=stream_of(hidden),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fwd_triton(hidden: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_fwd

    modulated_graph_conv_fwd(hidden, modulation, adjacency, bias, out)


# What follows the product; the last argument takes the result.
_FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]]
_FORWARD = {"cpp": _fwd_cpp, "cuda": _fwd_cuda, "triton": _fwd_triton}


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
    weights, factors, matrix = _parameters(weight, x.dtype, modulation, adjacency)
    grad_x, grad_weight, *sums = _backward(
        grad_out, x.contiguous(), weights, factors, matrix, hidden.reshape(-1, hidden.shape[2]),
        x.dtype if needs_x else None, weight.dtype, backend,
    )  # fmt: skip
    assert grad_weight is not None
    grad_modulation, grad_adjacency, grad_bias = (tensor.to(modulation.dtype) for tensor in sums)
    return x.new_empty(0) if grad_x is None else grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


def _empty_grads(hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> dict[str, Tensor]:
    return {
        "grad_hidden": torch.empty_like(hidden),
        "grad_modulation": torch.empty_like(modulation),
        "grad_adjacency": torch.empty_like(adjacency),
        "grad_bias": modulation.new_empty(modulation.shape[1]),
    }


def _bwd_cpp(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
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


def _bwd_cuda(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    grads = _empty_grads(hidden, modulation, adjacency)
    poses, joints, channels = grad_out.shape
    sizes = {"num_poses": poses, "num_joints": joints, "channels": channels}
    workspace = modulation.new_empty(cuda().modulated_graph_conv_bwd_workspace(**sizes))
    with on_device(hidden):
        cuda().modulated_graph_conv_bwd(
            grad_out=grad_out.data_ptr(),
            out_dtype=_name(grad_out.dtype),
            hidden=hidden.data_ptr(),
            dtype=_name(hidden.dtype),
            modulation=modulation.data_ptr(),
            adjacency=adjacency.data_ptr(),
            **{name: grad.data_ptr() for name, grad in grads.items()},
            workspace=workspace.data_ptr(),
            **sizes,
            stream=stream_of(hidden),
        )
    return tuple(grads.values())


def _bwd_triton(grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_bwd

    return modulated_graph_conv_bwd(grad_out, hidden, modulation, adjacency)


# The gradients of the product, modulation, adjacency and bias.
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]]
_BACKWARD = {"cpp": _bwd_cpp, "cuda": _bwd_cuda, "triton": _bwd_triton}


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
