"""The modulated graph convolution: the public op over the reference, the C++ code and the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffupose import reference
from diffupose.ops._backend import Backend, choose_backend, cpp

MAX_JOINTS = 64
"""What the C++ and Triton code takes."""


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
    bfloat16, Triton float16 as well; both sum in float32. Under ``torch.autocast`` the product alone is in the smaller
    type. Each pose's result depends on the others through the rounding of the matrix product at most, and no sum
    depends on the number of threads.

    Args:
        x: Features of shape ``[N, J, C_in]``.
        weight: ``[2, C_in, C_out]``: 0 for the joint itself, 1 for its neighbours.
        modulation: ``[J, C_out]``.
        adjacency: ``[J, J]``, already modulated and symmetrised.
        bias: ``[C_out]`` or None.
        backend: ``"auto"``, ``"torch"``, ``"cpp"`` or ``"triton"``; None takes the environment variable
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
    for name, dtypes in _DTYPES.items():
        if reason := _unfit(x, weight, product, parameters, dtypes):
            unfit[name] = f"this op's {'C++ code' if name == 'cpp' else 'Triton kernels'} {reason}"
    # C++ is the faster one wherever it was measured (forward and backward against the reference in one run, two busy
    # cores with AVX-512, torch 2.13): 2.2 times at N = 1024, C = 384 and 1.3 times or more at N = 128, C = 128 in eager
    # mode; 2.0 and 1.15 times under torch.compile; 1.8 and 1.2 times under autocast, compiled 1.1 times.
    chosen = choose_backend(backend, x.device, ("torch", *_DTYPES), unfit=unfit)
    if chosen == "torch":
        return reference.modulated_graph_conv(x, weight, modulation, adjacency, bias)
    x, weight = x.to(product), weight.to(product)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, *parameters)):
        return _ModulatedGraphConv.apply(x, weight, modulation, adjacency, bias, chosen)
    return torch.ops.diffupose.modulated_graph_conv_fwd.default(x, weight, modulation, adjacency, bias, chosen)[0]


def _check(x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [N, J, C_in], got {tuple(x.shape)}")
    joints, channels = x.shape[1:]
    if weight.ndim != 3 or weight.shape[:2] != (2, channels):
        raise ValueError(f"weight must have shape [2, {channels}, C_out], got {tuple(weight.shape)}")
    expected = {"modulation": (joints, weight.shape[2]), "adjacency": (joints, joints), "bias": (weight.shape[2],)}
    given = {"weight": weight, "modulation": modulation, "adjacency": adjacency, "bias": bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in expected and tensor.shape != expected[name]:
            raise ValueError(f"{name} must have shape {list(expected[name])}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if weight.dtype != x.dtype and not _autocasts(x):
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")


def _autocasts(x: Tensor) -> bool:
    """Return whether autocast decides the dtype of the product: not of float64, nor on devices that have none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.float16, torch.bfloat16)}


def _unfit(
    x: Tensor, weight: Tensor, product: torch.dtype, parameters: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """Return why code for some dtypes cannot take these inputs, to be put behind its name, or None."""
    if product not in dtypes:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"takes {', '.join(first)} and {last}, got {product}"
    if any(tensor.dtype != parameters[0].dtype for tensor in parameters) or parameters[0].dtype not in (
        torch.float32,
        product,
    ):
        return f"takes modulation, adjacency and bias all in float32 or all in {product}"
    if x.shape[1] > MAX_JOINTS:
        return f"takes {MAX_JOINTS} joints at most, got {x.shape[1]}"
    if 0 in (x.shape[1], x.shape[2], weight.shape[2]):
        return "takes at least one joint and one channel"
    return None


class _ModulatedGraphConv(torch.autograd.Function):
    """Autograd around the raw ops; old style, which costs a third of ``setup_context``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str
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


# --- The raw ops: float32, bfloat16 or, in Triton, float16 in. --------------------------------------------------------


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product ``a b``."""
    # oneDNN's product in float32, which torch.mm does not take: on an AMD EPYC with AVX-512, two threads, it was 1.4
    # to 2.3 times as fast as torch.mm (MKL) for the three products here, 2176 x 128 x 256 and 17408 x 384 x 768.
    on_cpu = a.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if a.dtype == torch.float32 and on_cpu:
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def _side_by_side(weight: Tensor) -> Tensor:
    return torch.cat((weight[0], weight[1]), dim=-1)  # [C_in, 2 C_out]


def _run_fwd(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None, backend: str = "cpp"
) -> tuple[Tensor, Tensor]:
    (poses, joints, _), channels = x.shape, weight.shape[2]
    out = x.new_empty(poses, joints, channels, dtype=torch.promote_types(x.dtype, modulation.dtype))
    if poses == 0:
        return out, x.new_empty(0, joints, 2 * channels)
    hidden = _multiply(x.contiguous().flatten(0, 1), _side_by_side(weight))  # [N J, 2 C_out]
    modulation, adjacency = modulation.float().contiguous(), adjacency.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if backend == "triton":
        from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_fwd

        modulated_graph_conv_fwd(hidden, modulation, adjacency, bias, out)
        return out, hidden.unflatten(0, (poses, joints))
    cpp().modulated_graph_conv_fwd(
        hidden=hidden.data_ptr(),
        hidden_bfloat16=hidden.dtype == torch.bfloat16,
        modulation=modulation.data_ptr(),
        adjacency=adjacency.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_bfloat16=out.dtype == torch.bfloat16,
        num_poses=poses,
        num_joints=joints,
        channels=channels,
        num_threads=torch.get_num_threads(),
    )
    return out, hidden.unflatten(0, (poses, joints))


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
    grads = _bwd_fake(grad_out, x, weight, modulation, adjacency, hidden, needs_x, backend)
    poses, joints, channels = grad_out.shape
    if poses == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out, hidden = grad_out.contiguous(), hidden.contiguous()
    small = [tensor.float().contiguous() for tensor in (modulation, adjacency)]
    if backend == "triton":
        from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_bwd

        grad_hidden, *sums = modulated_graph_conv_bwd(grad_out, hidden, *small)
    else:
        grad_hidden = torch.empty_like(hidden)
        sums = [torch.empty_like(tensor) for tensor in small] + [small[0].new_empty(channels)]
        cpp().modulated_graph_conv_bwd(
            grad_out=grad_out.data_ptr(),
            out_bfloat16=grad_out.dtype == torch.bfloat16,
            hidden=hidden.data_ptr(),
            hidden_bfloat16=hidden.dtype == torch.bfloat16,
            modulation=small[0].data_ptr(),
            adjacency=small[1].data_ptr(),
            grad_hidden=grad_hidden.data_ptr(),
            grad_modulation=sums[0].data_ptr(),
            grad_adjacency=sums[1].data_ptr(),
            grad_bias=sums[2].data_ptr(),
            num_poses=poses,
            num_joints=joints,
            channels=channels,
            num_threads=torch.get_num_threads(),
        )
    rows = grad_hidden.flatten(0, 1)  # [N J, 2 C_out]
    grad_x = _multiply(rows, _side_by_side(weight).t()).unflatten(0, (poses, joints)) if needs_x else grads[0]
    grad_weight = torch.stack(_multiply(x.contiguous().flatten(0, 1).t(), rows).chunk(2, dim=-1))
    grad_modulation, grad_adjacency, grad_bias = (tensor.to(modulation.dtype) for tensor in sums)
    return grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias


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
