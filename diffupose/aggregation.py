"""One pose out of many hypotheses, without any ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.camera import estimate_translation, person_box, project, split_intrinsics


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


def density_pick_of_hypotheses(hypotheses: Tensor) -> Tensor:
    """Return the hypothesis where the others lie densest, by a Gaussian kernel over whole poses.

    The bandwidth is half the median distance between two hypotheses of the row, so that with one cluster it is near the
    medoid, and with several in the heaviest.

    Args:
        hypotheses: Poses of shape ``[B, H, J, 3]``, in metres.

    Returns:
        Poses of shape ``[B, J, 3]``, in metres.
    """
    flat = hypotheses.flatten(2)
    # Not by a table of differences, which would be 3 J times as large; nor by products, which lose small distances.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")  # [B, H, H]
    count = hypotheses.shape[1]
    if count < 2:
        return hypotheses[:, 0]
    others = ~torch.eye(count, dtype=torch.bool, device=hypotheses.device)
    bandwidth = 0.5 * distance[:, others].median(dim=1).values[:, None, None]  # [B, 1, 1]
    density = torch.exp(-0.5 * (distance / bandwidth.clamp(min=1e-9)) ** 2).sum(dim=-1)  # [B, H]
    return _pick(hypotheses, -density)


def refine_by_reprojection(
    hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor, *, weight: float = 0.5
) -> Tensor:
    """Move each joint towards its viewing ray, keeping its depth.

    A hypothesis is placed by linear least squares; each present joint then moves sideways by ``weight`` times its
    confidence of the way to the ray through its keypoint, and the result is made root-relative again.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``; 0 where missing, at most 1 counts.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels.
        weight: Share of the way, 0 to 1; a detector's noise is what speaks against 1.

    Returns:
        Poses of shape ``[B, H, J, 3]``, in metres. Where the root cannot be placed they are unchanged.
    """
    translation = estimate_translation(hypotheses, keypoints_2d, confidence, intrinsics)
    focal, center = (item.reshape(-1, 1, 2).to(hypotheses) for item in split_intrinsics(intrinsics))
    share = weight * confidence.to(hypotheses).clamp(max=1.0)[:, None, :, None]  # [B, 1, J, 1]
    rays = ((keypoints_2d.to(hypotheses) - center) / focal).unsqueeze(1)  # [B, 1, J, 2]
    rays = torch.where(share > 0, rays, 0.0)
    placed = hypotheses + translation.unsqueeze(2)  # [B, H, J, 3]
    sideways = share * (rays * placed[..., 2:] - placed[..., :2])
    placed = torch.cat((placed[..., :2] + sideways, placed[..., 2:]), dim=-1)
    refined = placed - placed[:, :, :1]
    return torch.where(translation.isfinite().all(dim=-1)[..., None, None], refined, hypotheses)


def mean_by_reprojection(
    hypotheses: Tensor,
    keypoints_2d: Tensor,
    confidence: Tensor,
    intrinsics: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 0.02,
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
    error, _ = reprojection_error(hypotheses, keypoints_2d, confidence, intrinsics)
    _, half = person_box(keypoints_2d.to(hypotheses), confidence > 0)
    score = torch.softmax(-(error / (2.0 * half * temperature)).nan_to_num(torch.inf, torch.inf), dim=1)  # [B, H]
    refined = refine_by_reprojection(hypotheses, keypoints_2d, confidence, intrinsics, weight=weight)
    # A row in which no hypothesis can be placed: all count alike.
    return (score.nan_to_num(1.0 / hypotheses.shape[1])[..., None, None] * refined).sum(dim=1)


def _pick(hypotheses: Tensor, cost: Tensor) -> Tensor:
    best = cost.nan_to_num(torch.inf).argmin(dim=1)  # [B]
    return hypotheses[torch.arange(len(best), device=best.device), best]
