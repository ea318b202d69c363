"""What tests and benchmarks share: inputs by op, the parity rule, and marks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffupose.ops import available_backends

requires_cpp = pytest.mark.skipif(not available_backends()["cpp"][0], reason="no C++ extension")
requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

_SHORT_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def shape_id(value: object) -> str:
    """Return a test id for a shape or a dtype: ``2x5x51``, ``bf16``."""
    if isinstance(value, torch.dtype):
        return _SHORT_DTYPES.get(value, str(value))
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _philox_normal(num_frames: int, num_hypotheses: int, num_elements: int) -> tuple[Any, ...]:
    """Return random ids, negative ones among the frames; shape ``(B, H, num_elements)``."""
    limits = torch.iinfo(torch.int64)
    frame_ids = torch.randint(limits.min, limits.max, (num_frames,))  # [B]
    hypothesis_ids = torch.randint(0, 2**32, (num_hypotheses,))  # [H]
    return 0x9E3779B97F4A7C15, frame_ids, hypothesis_ids, 7, num_elements


def _hypothesis_statistics(num_frames: int, num_hypotheses: int, num_joints: int, view: bool = True) -> tuple[Any, ...]:
    """Return people of about a metre 3 to 6 m in front of cameras, with noisy keypoints, a tenth of them missing."""
    pose = 0.4 * torch.randn(num_frames, 1, num_joints, 3)
    hypotheses = pose + 0.05 * torch.randn(num_frames, num_hypotheses, num_joints, 3)
    hypotheses = hypotheses - hypotheses[:, :, :1]
    if not view:
        return (hypotheses,)
    intrinsics = torch.tensor([[1100.0, 0, 500], [0, 1000, 400], [0, 0, 1]]).repeat(num_frames, 1, 1)
    intrinsics[:, 0, 0] += 100 * torch.rand(num_frames)
    root = torch.tensor([0.0, 0, 3]) + torch.rand(num_frames, 1, 3) * torch.tensor([1.0, 1, 3])
    points = (pose - pose[:, :, :1]).squeeze(1) + root  # [B, J, 3]
    focal, center = intrinsics[:, None, [0, 1], [0, 1]], intrinsics[:, None, :2, 2]
    keypoints_2d = points[..., :2] / points[..., 2:] * focal + center + 5.0 * torch.randn(num_frames, num_joints, 2)
    confidence = torch.rand(num_frames, num_joints) * (torch.rand(num_frames, num_joints) > 0.1)
    return hypotheses, keypoints_2d.masked_fill(confidence.unsqueeze(-1) == 0, torch.nan), confidence, intrinsics


def _modulated_graph_conv(
    num_poses: int, num_joints: int, in_channels: int, out_channels: int, bias: bool = True
) -> tuple[Any, ...]:
    """Return features of unit scale and a dense adjacency; shape ``(N, J, C_in, C_out)``."""
    weight = torch.randn(2, in_channels, out_channels) * in_channels**-0.5
    modulation, adjacency = torch.randn(num_joints, out_channels), torch.rand(num_joints, num_joints)
    arguments = torch.randn(num_poses, num_joints, in_channels), weight, modulation, 0.5 * (adjacency + adjacency.T)
    return (*arguments, torch.randn(out_channels)) if bias else arguments


def _reverse_step(num_frames: int, num_hypotheses: int, num_joints: int, channels: int = 3) -> tuple[Any, ...]:
    """Return x_t, an output of more channels, a table whose row 1 has every term, x0_last, noise and its scale."""
    sample, x0_last, noise = torch.randn(3, num_frames, num_hypotheses, num_joints, 3)
    model_output = torch.randn(num_frames, num_hypotheses, num_joints, channels)
    coefficients = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1.1, -0.4, 0.3, 0.8, -0.2, 0.15]])
    return sample, model_output, coefficients, 1, x0_last, noise, 0.5 + torch.rand(2, num_joints, 3)


_MAKERS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "hypothesis_statistics": _hypothesis_statistics,
    "modulated_graph_conv": _modulated_graph_conv,
    "philox_normal": _philox_normal,
    "reverse_step": _reverse_step,
}


def make_inputs(
    op: str,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> tuple[Any, ...]:
    """Return random positional arguments for an op, drawn from PyTorch's global generator.

    Args:
        op: Name of the op.
        shape: The sizes the op's maker takes.
        dtype: Of the floating-point tensors; others keep theirs.
        device: Of all tensors.
        requires_grad: Whether floating-point tensors require their gradient.
    """
    return tuple(
        argument.to(device, dtype).requires_grad_(requires_grad)
        if isinstance(argument, Tensor) and argument.is_floating_point()
        else argument.to(device)
        if isinstance(argument, Tensor)
        else argument
        for argument in _MAKERS[op](*shape)
    )


def _outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Return the outputs and every input's gradient of the sum of all outputs times fixed weights, by name."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    result = function(*leaves)
    outputs = {"out": result} if isinstance(result, Tensor) else {f"out[{i}]": out for i, out in enumerate(result)}
    named = {name: out.detach() for name, out in outputs.items()}
    differentiable = [out for out in outputs.values() if out.requires_grad]
    if differentiable:
        # The same weights for every dtype and function, so that all gradients are of the same sum.
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in differentiable]
        torch.autograd.backward(differentiable, [w.to(o) for w, o in zip(weights, differentiable, strict=True)])
    names = list(inspect.signature(function).parameters)
    for name, leaf in zip(names, leaves, strict=False):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None, f"{name} got no gradient"
            named[f"grad_{name}"] = leaf.grad
    return named


def assert_parity(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    exact: Callable[..., Any] | None = None,
) -> None:
    """Assert that a fused op is about as close to the float64 result as the reference in the tested dtype.

    Per output and per gradient: ``error(fused) <= 2 error(reference) + atol``, where ``atol`` is 1e-6 (float32) or
    1e-3 (float16, bfloat16) of the largest float64 result.

    Args:
        fused: The op under test; it takes ``inputs`` as positional arguments.
        reference: The same function in plain PyTorch, with the same parameter names.
        inputs: Its arguments; gradients are compared for the tensors that require one.
        exact: What gives the float64 result; by default the reference on inputs cast to float64.

    Raises:
        AssertionError: Naming the output or gradient, the error and the bound.
    """
    doubles = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    doubles = [
        y.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else y
        for x, y in zip(inputs, doubles, strict=True)
    ]
    expected = _outputs_and_gradients(exact or reference, doubles)
    baseline = _outputs_and_gradients(reference, inputs)
    actual = _outputs_and_gradients(_with_names_of(reference, fused), inputs)
    assert actual.keys() == baseline.keys(), f"got {sorted(actual)}, expected {sorted(baseline)}"
    for name, value in actual.items():
        truth = expected[name].to(value.device)
        assert truth.dtype == torch.float64, f"the exact {name} must be float64, got {truth.dtype}"
        assert value.shape == truth.shape, f"{name} has shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
        assert value.dtype == baseline[name].dtype, f"{name} is {value.dtype}, expected {baseline[name].dtype}"
        if truth.numel() == 0:
            continue
        relative = 1e-6 if value.dtype == torch.float32 else 1e-3
        bound = 2 * (baseline[name].double() - truth).abs().max() + relative * truth.abs().max()
        error = (value.double() - truth).abs().max()
        # Written so that a NaN fails.
        assert error <= bound, f"{name}: error {error:.3e} exceeds {bound:.3e}"


def _with_names_of(reference: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the signature of ``reference``: a partial or a compiled function has none."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    return call
