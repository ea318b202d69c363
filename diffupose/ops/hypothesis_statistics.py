"""Statistics of a set of hypotheses in one pass: the public op over the reference, C++, CUDA and Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffupose import reference
from diffupose.camera import split_intrinsics
from diffupose.ops._backend import Backend, choose_backend, cpp, cuda, is_transformed, name_of, on_device, stream_of


class HypothesisStatistics(NamedTuple):
    """What the hypotheses of each frame amount to; the last two are None without keypoints."""

    mean: Tensor
    """``[B, J, 3]``, metres."""
    covariance: Tensor
    """``[B, J, 3, 3]``, square metres, unbiased; NaN for fewer than 4 hypotheses, which cannot span 3D."""
    weights: Tensor | None
    """``[B, H]``, how well each hypothesis projects; they sum to 1."""
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

    Each hypothesis is placed by linear least squares; its weight is ``exp(-error / (temperature s))``, the weighted
    mean distance to the keypoints over the longer side s of their box. What is averaged are the hypotheses with each
    joint moved sideways towards its viewing ray (``aggregation.refine_by_reprojection``). No ground truth is used.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``, none of them negative; 0 where missing.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels. All three are given, or none.
        weight: Of ``refine_by_reprojection``, 0 to 1.
        temperature: In box sides; infinity weighs all alike.
        backend: ``"auto"``, ``"torch"``, or ``"cpp"``, ``"cuda"`` or ``"triton"``, which take float32 and have no
            gradient; None takes the environment variable DIFFUPOSE_BACKEND, or else ``"auto"``. The results of the
            latter three for a frame are the same bits for any batch and number of threads.

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
    chosen = choose_backend(backend, hypotheses.device, ("torch", *_IMPLEMENTATIONS), unfit=unfit)
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
        if tensor is None:
            continue
        if tuple(tensor.shape) not in expected[name]:
            wanted = " or ".join(str(list(shape)) for shape in expected[name])
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.device != hypotheses.device:
            raise ValueError(f"{name} must be on the device of hypotheses, {hypotheses.device}, got {tensor.device}")


MAX_JOINTS = {"cuda": 64, "triton": 640}
"""What kernels take."""

_CODE = {"cpp": "C++ code", "cuda": "CUDA code", "triton": "Triton kernel"}


def _unfit(hypotheses: Tensor, view: tuple[Tensor | None, ...]) -> dict[str, str]:
    """Return which backends cannot take these inputs, and why."""
    seen = any(tensor is not None and tensor.requires_grad for tensor in view)
    if hypotheses.dtype != torch.float32:
        reason = f"takes float32, got {hypotheses.dtype}"
    elif torch.is_grad_enabled() and (hypotheses.requires_grad or seen):
        reason = "has no gradient"
    elif is_transformed():
        reason = "has no rules for torch.func"
    else:
        return {
            name: f"this op's {_CODE[name]} takes {most} joints at most, got {hypotheses.shape[2]}"
            for name, most in MAX_JOINTS.items()
            if hypotheses.shape[2] > most
        }
    return {name: f"this op's {code} {reason}" for name, code in _CODE.items()}


# --- The raw op: float32. ---------------------------------------------------------------------------------------------


def _launch(
    function: Callable[..., None],
    hypotheses: Tensor,
    view: dict[str, Any],
    weight: float,
    temperature: float,
    **where: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call an extension's function, ``where`` it is to run, and return what it writes."""
    results = _fake(hypotheses, view["keypoints_2d"], None, None, weight, temperature)
    names = "mean", "covariance", "weights", "weighted_mean"
    tensors = view | {"hypotheses": hypotheses.contiguous()} | dict(zip(names, results, strict=True))
    function(
        # A tensor's address, 0 for none.
        **{
            name: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
            for name, value in tensors.items()
        },
        weight=weight,
        temperature=temperature,
        num_frames=hypotheses.shape[0],
        num_hypotheses=hypotheses.shape[1],
        num_joints=hypotheses.shape[2],
        **where,
    )
    return results


def _run_cpp(
    hypotheses: Tensor, keypoints_2d: Tensor | None, confidence: Tensor | None, intrinsics: Tensor | None, *rest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # [B or nothing, 4]: fx, fy, cx, cy
    cameras = None if intrinsics is None else torch.cat(split_intrinsics(intrinsics), dim=-1)
    view: dict[str, Any] = {
        name: None if tensor is None else tensor.double().contiguous()
        for name, tensor in (("keypoints_2d", keypoints_2d), ("confidence", confidence), ("cameras", cameras))
    }
    view["shared_camera"] = cameras is not None and cameras.ndim == 1
    return _launch(cpp().hypothesis_statistics, hypotheses, view, *rest, num_threads=torch.get_num_threads())


def _run_cuda(
    hypotheses: Tensor, keypoints_2d: Tensor | None, confidence: Tensor | None, intrinsics: Tensor | None, *rest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen = {"keypoints_2d": keypoints_2d, "confidence": confidence, "intrinsics": intrinsics}
    # As they are, where all are float32: to convert them costs more than the rest where hypotheses are few.
    single = all(tensor is None or tensor.dtype == torch.float32 for tensor in seen.values())
    dtype = torch.float32 if single else torch.float64
    view: dict[str, Any] = {
        name: None if tensor is None else tensor.to(dtype).contiguous() for name, tensor in seen.items()
    }
    view["view_dtype"] = name_of(dtype)
    view["shared_camera"] = intrinsics is not None and intrinsics.ndim == 2
    with on_device(hypotheses):
        return _launch(cuda().hypothesis_statistics, hypotheses, view, *rest, stream=stream_of(hypotheses))


def _run_triton(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None,
    confidence: Tensor | None,
    intrinsics: Tensor | None,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from diffupose.kernels.hypothesis_statistics import hypothesis_statistics as kernel

    return kernel(hypotheses, keypoints_2d, confidence, intrinsics, weight, temperature)


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "cpp": _run_cpp,
    "cuda": _run_cuda,
    "triton": _run_triton,
}


def _run(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None,
    confidence: Tensor | None,
    intrinsics: Tensor | None,
    weight: float,
    temperature: float,
    backend: str = "cpp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend](hypotheses, keypoints_2d, confidence, intrinsics, weight, temperature)


def _fake(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None,
    confidence: Tensor | None,
    intrinsics: Tensor | None,
    weight: float,
    temperature: float,
    backend: str = "cpp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, joints, _ = hypotheses.shape
    mean, covariance = hypotheses.new_empty(batch, joints, 3), hypotheses.new_empty(batch, joints, 3, 3)
    if keypoints_2d is None:
        return mean, covariance, hypotheses.new_empty(0), hypotheses.new_empty(0)
    return mean, covariance, hypotheses.new_empty(batch, count), hypotheses.new_empty(batch, joints, 3)


_lib = torch.library.Library("diffupose", "FRAGMENT")
_lib.define(
    "hypothesis_statistics(Tensor hypotheses, Tensor? keypoints_2d, Tensor? confidence, Tensor? intrinsics, "
    'float weight, float temperature, str backend="cpp") -> (Tensor, Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.impl("hypothesis_statistics", _run, "CPU")
_lib.impl("hypothesis_statistics", _run, "CUDA")
torch.library.register_fake("diffupose::hypothesis_statistics", _fake, lib=_lib)
