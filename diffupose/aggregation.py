"""One pose out of many hypotheses, without any ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.camera import estimate_translation, project, split_intrinsics


def medoid_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the hypothesis with the smallest mean joint distance to the others.

    Unlike the mean it is a pose that was really sampled, with bones of their own length.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.
    """
    total = torch.zeros(hypotheses.shape[:2], dtype=hypotheses.dtype, device=hypotheses.device)  # [B, H]
    for other in range(hypotheses.shape[1]):
        total += (hypotheses - hypotheses[:, other : other + 1]).norm(dim=-1).mean(dim=-1)
    return _pick(hypotheses, total)


def reprojection_error(
    hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far each hypothesis lies from the keypoints when placed as well as it can be.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``; 0 where missing.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels.

    Returns:
        Weighted mean distance over the present joints ``[B, H]``, in pixels, and the root's estimated translation
        ``[B, H, 3]``, in metres (``camera.estimate_translation``).
    """
    translation = estimate_translation(hypotheses, keypoints_2d, confidence, intrinsics)
    focal, center = (item.reshape(-1, 1, 2).to(hypotheses) for item in split_intrinsics(intrinsics))
    points = hypotheses + translation.unsqueeze(2)
    # A joint behind the camera has no image: far away is the honest distance.
    in_front = points[..., 2:] > 1e-3
    projected = project(torch.where(in_front, points, points.new_ones(())), focal, center)  # [B, H, J, 2]
    weight = confidence.to(hypotheses)
    seen = torch.where(weight.unsqueeze(-1) > 0, keypoints_2d.to(hypotheses), 0.0).unsqueeze(1)  # [B, 1, J, 2]
    distance = torch.where(in_front.squeeze(-1), (projected - seen).norm(dim=-1), torch.inf)  # [B, H, J]
    weighted = torch.where(weight.unsqueeze(1) > 0, distance * weight.unsqueeze(1), 0.0)
    return weighted.sum(-1) / weight.sum(-1, keepdim=True), translation


def best_by_reprojection(hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor) -> Tensor:
    """Return the hypothesis ``[B, J, 3]`` with the smallest ``reprojection_error``; arguments are the same."""
    error, _ = reprojection_error(hypotheses, keypoints_2d, confidence, intrinsics)
    return _pick(hypotheses, error)


def _pick(hypotheses: Tensor, cost: Tensor) -> Tensor:
    best = cost.nan_to_num(torch.inf).argmin(dim=1)  # [B]
    return hypotheses[torch.arange(len(best), device=best.device), best]
