"""Statistics of a set of hypotheses in one pass: the public op over all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffupose import reference
from diffupose.camera import split_intrinsics
from diffupose.ops._backend import Backend, choose_backend, is_transformed
from diffupose.ops._common import address, call_extension, check_device, check_shape, register, unfit_for
from diffupose.reference.hypothesis_statistics import weighted_by_reprojection


class HypothesisStatistics(NamedTuple):
    """Statistics of the hypotheses of each frame; the last two are None without keypoints."""

    mean: Tensor
    """``[B, J, 3]``, metres."""
    covariance: Tensor
    """``[B, J, 3, 3]``, square metres, unbiased; NaN for fewer than 4 hypotheses, which cannot span 3D."""
    weights: Tensor | None
    """``[B, H]``, larger for hypotheses that lie nearer to the keypoints; they sum to 1."""
    weighted_mean: Tensor | None
    """``[B, J, 3]``, metres, of the hypotheses moved towards their viewing rays."""


def hypothesis_statistics(
    hypotheses: Tensor,
    *,
    keypoints_2d: Tensor | None = None,
    confidence: Tensor | None = None,
    intrinsics: Tensor | None = None,
    weight: float = 1.0,
    temperature: float = 0.01,
    backend: Backend | None = None,
) -> HypothesisStatistics:
    """Return mean and covariance of every joint and, given keypoints, the mean weighted by reprojection.

    Each hypothesis is placed by linear least squares. Its error is the weighted mean distance to the keypoints, and its
    weight is ``exp(-error / (temperature s))`` with the longer side s of the keypoints' box. The weighted mean is taken
    after each joint has moved sideways towards its viewing ray (``aggregation.refine_by_reprojection``). No ground
    truth is used.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``, none of them negative; 0 where missing.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels. All three are given, or none.
        weight: The weight of ``refine_by_reprojection``, 0 to 1.
        temperature: In box sides; with infinity all weights are equal.
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; None takes the environment variable
            DIFFUPOSE_BACKEND, or else ``"auto"``. The last three take float32 and have no gradient. Their results for a
            frame are the same bits for any batch and number of threads. CUDA code computes mean and covariance only:
            with keypoints, ``"auto"`` takes Triton on a GPU, else PyTorch, and a named ``"cuda"`` leaves weights and
            weighted mean to PyTorch, whose bits may depend on the batch.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or some of the keypoints' arguments are missing.
        BackendUnavailableError: If the named backend cannot run here or not take these inputs.

    Example:
        >>> corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        >>> hypothesis_statistics(corners.reshape(1, 4, 1, 3)).covariance[0, 0, 0]  # variance 4 / (4 - 1)
        tensor([1.3333, 0.0000, 0.0000])
    """
    _check(hypotheses, keypoints_2d, confidence, intrinsics)
    unfit = _unfit(hypotheses, (keypoints_2d, confidence, intrinsics))
    only_named = () if keypoints_2d is None else ("cuda",)
    implemented = "torch", *_IMPLEMENTATIONS
    chosen = choose_backend(backend, hypotheses.device, implemented, unfit=unfit, only_named=only_named)
    arguments = hypotheses, keypoints_2d, confidence, intrinsics, float(weight), float(temperature)
    mean, covariance, weights, weighted_mean = (
        reference.hypothesis_statistics(*arguments)
        if chosen == "torch"
        else torch.ops.diffupose.hypothesis_statistics.default(*arguments, chosen)
    )
    if keypoints_2d is None:
        return HypothesisStatistics(mean, covariance, None, None)
    return HypothesisStatistics(mean, covariance, weights, weighted_mean)


def _check(
    hypotheses: Tensor, keypoints_2d: Tensor | None, confidence: Tensor | None, intrinsics: Tensor | None
) -> None:
    if hypotheses.ndim != 4 or hypotheses.shape[-1] != 3 or 0 in hypotheses.shape[1:]:
        raise ValueError(
            f"hypotheses must have shape [B, H, J, 3] with H and J at least 1, got {tuple(hypotheses.shape)}"
        )
    if hypotheses.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"hypotheses must be float32 or float64, got {hypotheses.dtype}")
    batch, _, joints, _ = hypotheses.shape
    view = {"keypoints_2d": keypoints_2d, "confidence": confidence, "intrinsics": intrinsics}
    expected: dict[str, list[tuple[int, ...]]] = {
        "keypoints_2d": [(batch, joints, 2)],
        "confidence": [(batch, joints)],
        "intrinsics": [(batch, 3, 3), (3, 3)],
    }
    missing = [name for name, tensor in view.items() if tensor is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{missing[0]} must be given with the others of {', '.join(view)}, got None")
    for name, tensor in view.items():
        if tensor is not None:
            check_shape(name, tensor, *expected[name])
            check_device(name, tensor, "hypotheses", hypotheses.device)


MAX_JOINTS = {"cuda": 64, "triton": 640}
"""The most joints that these kernels take."""


def _unfit(hypotheses: Tensor, view: tuple[Tensor | None, ...]) -> dict[str, str]:
    """Return which backends cannot take these inputs, and why."""
    if hypotheses.dtype != torch.float32:
        return unfit_for(f"takes float32, got {hypotheses.dtype}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (hypotheses, *view)):
        return unfit_for("has no gradient")
    if is_transformed():
        return unfit_for("has no rules for torch.func")
    unfit: dict[str, str] = {}
    for name, most in MAX_JOINTS.items():
        if hypotheses.shape[2] > most:
            unfit |= unfit_for(f"takes {most} joints at most, got {hypotheses.shape[2]}", (name,))
    return unfit


# --- The raw op: float32. ---------------------------------------------------------------------------------------------

_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _run_cpp(
    hypotheses: Tensor, keypoints_2d: Tensor | None, confidence: Tensor | None, intrinsics: Tensor | None, *rest: float
) -> _Results:
    weight, temperature = rest
    hypotheses = hypotheses.contiguous()
    results = _fake(hypotheses, keypoints_2d)
    # [B or nothing, 4]: fx, fy, cx, cy
    cameras = None if intrinsics is None else torch.cat(split_intrinsics(intrinsics), dim=-1)
    view = {"keypoints_2d": keypoints_2d, "confidence": confidence, "cameras": cameras}
    view = {name: None if tensor is None else tensor.double().contiguous() for name, tensor in view.items()}
    names = "mean", "covariance", "weights", "weighted_mean"
    arguments: dict[str, Any] = {
        "hypotheses": hypotheses.data_ptr(),
        **{name: address(tensor) for name, tensor in view.items()},
        "shared_camera": cameras is not None and cameras.ndim == 1,
        "weight": weight,
        "temperature": temperature,
        **{name: tensor.data_ptr() for name, tensor in zip(names, results, strict=True)},
        **_sizes(hypotheses),
    }
    call_extension("cpp", "hypothesis_statistics", hypotheses, arguments)
    return results


def _run_cuda(
    hypotheses: Tensor, keypoints_2d: Tensor | None, confidence: Tensor | None, intrinsics: Tensor | None, *rest: float
) -> _Results:
    hypotheses = hypotheses.contiguous()
    mean, covariance, weights, weighted_mean = _fake(hypotheses, None)
    tensors = {"hypotheses": hypotheses, "mean": mean, "covariance": covariance}
    arguments = {name: tensor.data_ptr() for name, tensor in tensors.items()} | _sizes(hypotheses)
    call_extension("cuda", "hypothesis_statistics", hypotheses, arguments)
    if keypoints_2d is not None and confidence is not None and intrinsics is not None:
        with torch.no_grad():
            weights, weighted_mean = weighted_by_reprojection(hypotheses, keypoints_2d, confidence, intrinsics, *rest)
    return mean, covariance, weights, weighted_mean


def _sizes(hypotheses: Tensor) -> dict[str, int]:
    frames, count, joints, _ = hypotheses.shape
    return {"num_frames": frames, "num_hypotheses": count, "num_joints": joints}


def _run_triton(*arguments: Any) -> _Results:
    from diffupose.kernels.hypothesis_statistics import hypothesis_statistics as kernel

    return kernel(*arguments)


_IMPLEMENTATIONS: dict[str, Callable[..., _Results]] = {"cpp": _run_cpp, "cuda": _run_cuda, "triton": _run_triton}


def _run(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None,
    confidence: Tensor | None,
    intrinsics: Tensor | None,
    weight: float,
    temperature: float,
    backend: str = "cpp",
) -> _Results:
    return _IMPLEMENTATIONS[backend](hypotheses, keypoints_2d, confidence, intrinsics, weight, temperature)


def _fake(hypotheses: Tensor, keypoints_2d: Tensor | None, *rest: Any) -> _Results:
    batch, count, joints, _ = hypotheses.shape
    mean, covariance = hypotheses.new_empty(batch, joints, 3), hypotheses.new_empty(batch, joints, 3, 3)
    if keypoints_2d is None:
        return mean, covariance, hypotheses.new_empty(0), hypotheses.new_empty(0)
    return mean, covariance, hypotheses.new_empty(batch, count), hypotheses.new_empty(batch, joints, 3)


register(
    "hypothesis_statistics(Tensor hypotheses, Tensor? keypoints_2d, Tensor? confidence, Tensor? intrinsics, "
    'float weight, float temperature, str backend="cpp") -> (Tensor, Tensor, Tensor, Tensor)',
    _run,
    _fake,
)
