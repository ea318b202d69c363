"""One pose out of many hypotheses, without any ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.ops.hypothesis_statistics import hypothesis_statistics
from diffupose.reference.hypothesis_statistics import refine_by_reprojection, reprojection_error

__all__ = [
    "best_by_reprojection",
    "density_pick_of_hypotheses",
    "mean_by_reprojection",
    "medoid_of_hypotheses",
    "refine_by_reprojection",
    "reprojection_error",
]


def medoid_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the hypothesis with the smallest mean joint distance to the others.

    Unlike the mean it is one of the samples, so its bones keep their lengths.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.
    """
    total = torch.zeros(hypotheses.shape[:2], dtype=hypotheses.dtype, device=hypotheses.device)  # [B, H]
    for other in range(hypotheses.shape[1]):
        total += (hypotheses - hypotheses[:, other : other + 1]).norm(dim=-1).mean(dim=-1)
    return _pick(hypotheses, total)


def best_by_reprojection(hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor) -> Tensor:
    """Return the hypothesis ``[B, J, 3]`` with the smallest ``reprojection_error``; arguments are the same."""
    error, _ = reprojection_error(hypotheses, keypoints_2d, confidence, intrinsics)
    return _pick(hypotheses, error)


def density_pick_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the hypothesis where the others lie densest, by a Gaussian kernel over whole poses.

    The bandwidth is half the median distance between two hypotheses of the row. With one cluster the result is near the
    medoid; with several it lies in the heaviest.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.
    """
    flat = hypotheses.flatten(2)
    # A table of differences would be 3 J times as large, and matrix products lose small distances.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")  # [B, H, H]
    count = hypotheses.shape[1]
    if count < 2:
        return hypotheses[:, 0]
    others = ~torch.eye(count, dtype=torch.bool, device=hypotheses.device)
    bandwidth = 0.5 * distance[:, others].median(dim=1).values[:, None, None]  # [B, 1, 1]
    density = torch.exp(-0.5 * (distance / bandwidth.clamp(min=1e-9)) ** 2).sum(dim=-1)  # [B, H]
    return _pick(hypotheses, -density)


def mean_by_reprojection(
    hypotheses: Tensor,
    keypoints_2d: Tensor,
    confidence: Tensor,
    intrinsics: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 0.01,
) -> Tensor:
    """Return the mean of the refined hypotheses, weighted by how well they project before they are refined.

    The weight of a hypothesis is ``exp(-error / (temperature s))``: its ``reprojection_error`` over the longer side s
    of the keypoints' box. No ground truth is used.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``; 0 where missing.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels.
        weight: Of ``refine_by_reprojection``.
        temperature: In box sides; infinity weighs all alike.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.
    """
    result = hypothesis_statistics(
        hypotheses,
        keypoints_2d=keypoints_2d,
        confidence=confidence,
        intrinsics=intrinsics,
        weight=weight,
        temperature=temperature,
    )
    assert result.weighted_mean is not None  # keypoints were given
    return result.weighted_mean


def _pick(hypotheses: Tensor, cost: Tensor) -> Tensor:
    best = cost.nan_to_num(torch.inf).argmin(dim=1)  # [B]
    return hypotheses[torch.arange(len(best), device=best.device), best]
