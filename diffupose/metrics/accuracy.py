"""Errors of one pose against the truth: MPJPE and its aligned variants, velocity, PCK and AUC."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.metrics._checks import MM_PER_M, check_pair


def per_joint_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the Euclidean distance of every joint from its target.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres.
        target: Poses of the same shape, in metres.

    Returns:
        Distances of shape ``[..., J]``, in millimetres.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> per_joint_error(torch.tensor([[0.0, 0.3, 0.4]]), torch.zeros(1, 3))
        tensor([500.])
    """
    predicted, target = check_pair(predicted, target)
    error: Tensor = torch.linalg.vector_norm(predicted - target, dim=-1)  # [..., J]
    return error * MM_PER_M


def mpjpe(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean per-joint position error (Protocol 1), over all joints with the root.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres.
        target: Poses of the same shape, in metres.

    Returns:
        Errors of shape ``[...]``, in millimetres.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> mpjpe(torch.full((1, 17, 3), 0.0), torch.tensor([0.0, 0.3, 0.4]).expand(1, 17, 3))
        tensor([500.])

    Reference:
        Ionescu et al. 2014; Pavllo et al. 2019.
    """
    return per_joint_error(predicted, target).mean(dim=-1)


def p_mpjpe(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean per-joint position error after rigid alignment (Protocol 2).

    ``predicted`` is moved by the rotation R, scale s and shift t that minimise ``sum_j |s R x_j + t - y_j|^2``.
    Reflections are excluded. A prediction with all joints in one point lands on the centre of the target.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres.
        target: Poses of the same shape, in metres.

    Returns:
        Errors of shape ``[...]``, in millimetres.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> pose = torch.randn(1, 17, 3)
        >>> bool(p_mpjpe(pose, 2.0 * pose) < 0.1)  # invariant to scale
        True

    Reference:
        Umeyama 1991; Pavllo et al. 2019.
    """
    predicted, target = check_pair(predicted, target)
    target_center = target.mean(dim=-2, keepdim=True)
    centered = predicted - predicted.mean(dim=-2, keepdim=True)
    target_centered = target - target_center
    correlation = centered.transpose(-1, -2) @ target_centered  # [..., 3, 3]
    # The 3x3 decompositions run in float64 on the CPU: exact enough for flat poses, and available for every device.
    # The SVD refuses NaN; the error of such a pose becomes NaN by its own coordinates.
    finite = correlation.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    safe = torch.where(finite, correlation, 0.0).cpu().double()
    u, singular, vh = torch.linalg.svd(safe)
    sign = torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0).to(singular)
    signs = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)  # [..., 3]
    rotation = ((u * signs.unsqueeze(-2)) @ vh).to(predicted)  # row vectors: aligned = x @ rotation
    trace = (singular * signs).sum(dim=-1).to(predicted)
    spread = centered.square().sum(dim=(-2, -1))
    scale = torch.where(spread > 0, trace / torch.where(spread > 0, spread, 1.0), 0.0)
    aligned = scale[..., None, None] * (centered @ rotation) + target_center
    return mpjpe(aligned, target)


def n_mpjpe(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean per-joint position error after the best scaling about the root (Protocol 3).

    One scale per pose, ``s = sum <x_j, y_j> / sum <x_j, x_j>`` over all joints and axes, whatever the leading axes are.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres, root-relative.
        target: Poses of the same shape, in metres, root-relative.

    Returns:
        Errors of shape ``[...]``, in millimetres.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> pose = torch.ones(1, 17, 3)
        >>> n_mpjpe(pose, 2.0 * pose)
        tensor([0.])

    Reference:
        Rhodin et al. 2018; Pavllo et al. 2019.
    """
    predicted, target = check_pair(predicted, target)
    product = (predicted * target).sum(dim=(-2, -1))
    power = predicted.square().sum(dim=(-2, -1))
    # A pose of zeros stays zero under any scale.
    scale = torch.where(power == 0, 1.0, product / torch.where(power == 0, 1.0, power))
    return mpjpe(scale[..., None, None] * predicted, target)


def mpjve(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean per-joint velocity error of one sequence.

    Args:
        predicted: Consecutive poses of shape ``[T, J, 3]``, in metres.
        target: Poses of the same shape, in metres.

    Returns:
        A scalar, in millimetres per frame; NaN for fewer than two frames.

    Raises:
        ValueError: If the shapes differ or are not ``[T, J, 3]``, or the dtype is not float32 or float64.

    Example:
        >>> mpjve(torch.zeros(2, 1, 3), torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.5]]]))
        tensor(500.)

    Reference:
        Pavllo et al. 2019.
    """
    predicted, target = check_pair(predicted, target, "[T, J, 3]", ndim=3)
    velocity_error = (predicted - target).diff(dim=0)  # [T - 1, J, 3]
    distance: Tensor = torch.linalg.vector_norm(velocity_error, dim=-1)  # [T - 1, J]
    return distance.mean() * MM_PER_M


def _share_below(error: Tensor, threshold_mm: float) -> Tensor:
    """Return the percentage of joints with an error below the threshold; NaN where an error is NaN."""
    below = torch.where(error.isnan(), error, (error < threshold_mm).to(error.dtype))
    return below.mean(dim=-1) * 100.0


def pck(predicted: Tensor, target: Tensor, threshold_mm: float = 150.0) -> Tensor:
    """Return the percentage of correct keypoints: joints with an error strictly below the threshold.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres.
        target: Poses of the same shape, in metres.
        threshold_mm: Threshold in millimetres.

    Returns:
        Percentages of shape ``[...]``.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> pck(torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.0, 0.2]]), torch.zeros(2, 3))
        tensor(50.)

    Reference:
        Mehta et al. 2017 (MPI-INF-3DHP).
    """
    return _share_below(per_joint_error(predicted, target), threshold_mm)


def auc(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the area under the PCK curve by the convention of MPI-INF-3DHP.

    The plain mean of PCK at the 31 thresholds 0, 5, ..., 150 mm. Errors count when strictly below the threshold, so the
    threshold 0 always gives 0 and a perfect pose scores 100 * 30 / 31 = 96.77.

    Args:
        predicted: Poses of shape ``[..., J, 3]``, in metres.
        target: Poses of the same shape, in metres.

    Returns:
        Percentages of shape ``[...]``.

    Raises:
        ValueError: If the shapes differ, the last axis is not 3, or the dtype is not float32 or float64.

    Example:
        >>> round(float(auc(torch.zeros(17, 3), torch.zeros(17, 3))), 2)
        96.77

    Reference:
        Mehta et al. 2017 (MPI-INF-3DHP).
    """
    error = per_joint_error(predicted, target)
    return torch.stack([_share_below(error, threshold) for threshold in range(0, 151, 5)]).mean(dim=0)
