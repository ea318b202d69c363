"""Statistics of a set of hypotheses: mean, covariance, and the mean weighted by reprojection."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.camera import estimate_translation, person_box, project, split_intrinsics

MIN_HYPOTHESES = 4
"""With fewer, the covariance is NaN: they cannot span 3D."""


def mean_of(hypotheses: Tensor) -> Tensor:
    """Return the mean over axis 1 of ``[B, H, J, 3]``."""
    # Differences are averaged: so the mean of equal hypotheses is exactly that pose, and their covariance exactly 0.
    first = hypotheses[:, :1]
    return (first + (hypotheses - first).mean(dim=1, keepdim=True)).squeeze(1)


def covariance_of(hypotheses: Tensor, mean: Tensor) -> Tensor:
    """Return the unbiased covariance ``[B, J, 3, 3]`` around ``mean_of`` of the same hypotheses."""
    frames, count, joints, _ = hypotheses.shape
    if count < MIN_HYPOTHESES:
        return hypotheses.new_full((frames, joints, 3, 3), torch.nan)
    centered = (hypotheses - mean.unsqueeze(1)).transpose(1, 2)  # [B, J, H, 3]
    return torch.div(centered.transpose(-1, -2) @ centered, count - 1)


def reprojection_error(
    hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the distance of each hypothesis from the keypoints after the best placement.

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
    # A joint behind the camera has no image, so its distance is infinite.
    in_front = points[..., 2:] > 1e-3
    projected = project(torch.where(in_front, points, points.new_ones(())), focal, center)  # [B, H, J, 2]
    weight = confidence.to(hypotheses)
    seen = torch.where(weight.unsqueeze(-1) > 0, keypoints_2d.to(hypotheses), 0.0).unsqueeze(1)  # [B, 1, J, 2]
    distance = torch.where(in_front.squeeze(-1), (projected - seen).norm(dim=-1), torch.inf)  # [B, H, J]
    weighted = torch.where(weight.unsqueeze(1) > 0, distance * weight.unsqueeze(1), 0.0)
    return weighted.sum(-1) / weight.sum(-1, keepdim=True), translation


def refine_by_reprojection(
    hypotheses: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor, *, weight: float = 1.0
) -> Tensor:
    """Move each joint towards its viewing ray at constant depth, the more its keypoint can be trusted.

    A hypothesis is placed by linear least squares. Each present joint then moves sideways towards the ray through its
    keypoint by ``weight`` times its confidence times ``S / (S + R)`` of the distance, as in a Kalman filter. The
    result is made root-relative again.

    S is the variance of the joint in the image over the hypotheses. R is the variance of the keypoint: its squared
    distance from the hypotheses' mean, or the mean of that over the pose's joints if it is larger. So an exact
    keypoint, which lies near the hypotheses, moves the joint more than a wrong detection.

    Args:
        hypotheses: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels of shape ``[B, J, 2]``; NaN where missing.
        confidence: Weights of shape ``[B, J]``; 0 where missing, clamped to 1.
        intrinsics: Camera matrices of shape ``[B, 3, 3]`` or ``[3, 3]``, in pixels.
        weight: Share of that distance, 0 to 1.

    Returns:
        Poses of shape ``[B, H, J, 3]``, in metres; unchanged where the root cannot be placed.
    """
    translation = estimate_translation(hypotheses, keypoints_2d, confidence, intrinsics)
    focal, center = (item.reshape(-1, 1, 2).to(hypotheses) for item in split_intrinsics(intrinsics))
    present = confidence > 0  # [B, J]
    rays = ((keypoints_2d.to(hypotheses) - center) / focal).unsqueeze(1)  # [B, 1, J, 2]
    rays = torch.where(present[:, None, :, None], rays, 0.0)
    placed = hypotheses + translation.unsqueeze(2)  # [B, H, J, 3]
    share = weight * confidence.to(hypotheses).clamp(max=1.0) * _trust(placed, rays, present)  # [B, J]
    share = share[:, None, :, None]
    sideways = share * (rays * placed[..., 2:] - placed[..., :2])
    placed = torch.cat((placed[..., :2] + sideways, placed[..., 2:]), dim=-1)
    refined = placed - placed[:, :, :1]
    return torch.where(translation.isfinite().all(dim=-1)[..., None, None], refined, hypotheses)


def _trust(placed: Tensor, rays: Tensor, present: Tensor) -> Tensor:
    """Return S / (S + R) of ``refine_by_reprojection``, ``[B, J]``; 0 where it has no value."""
    seen = placed[..., :2] / placed[..., 2:]  # [B, H, J, 2], in focal lengths
    center = seen.mean(dim=1, keepdim=True)
    spread = (seen - center).square().sum(dim=-1).mean(dim=1)  # [B, J]
    offset = (center - rays).square().sum(dim=-1).squeeze(1)  # [B, J]
    mean = torch.where(present, offset, 0.0).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True)
    return (spread / (spread + torch.maximum(offset, mean))).nan_to_num(0.0, 0.0, 0.0)


def hypothesis_statistics(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None = None,
    confidence: Tensor | None = None,
    intrinsics: Tensor | None = None,
    weight: float = 1.0,
    temperature: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, covariance, reprojection weights and weighted mean; see ``diffupose.ops.hypothesis_statistics``.

    Without keypoints the last two are empty.
    """
    mean = mean_of(hypotheses)
    covariance = covariance_of(hypotheses, mean)
    if keypoints_2d is None or confidence is None or intrinsics is None:
        return mean, covariance, hypotheses.new_empty(0), hypotheses.new_empty(0)
    view = keypoints_2d, confidence, intrinsics
    return mean, covariance, *weighted_by_reprojection(hypotheses, *view, weight, temperature)


def weighted_by_reprojection(
    hypotheses: Tensor,
    keypoints_2d: Tensor,
    confidence: Tensor,
    intrinsics: Tensor,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the last two results of ``hypothesis_statistics``: ``[B, H]`` and ``[B, J, 3]``."""
    error, _ = reprojection_error(hypotheses, keypoints_2d, confidence, intrinsics)
    _, half = person_box(keypoints_2d.to(hypotheses), confidence > 0)
    cost = (error / (2.0 * half * temperature)).nan_to_num(torch.inf, torch.inf)  # [B, H]
    # If no hypothesis of a frame can be placed, all have the same weight.
    weights = torch.softmax(-cost, dim=1).nan_to_num(1.0 / hypotheses.shape[1])
    refined = refine_by_reprojection(hypotheses, keypoints_2d, confidence, intrinsics, weight=weight)
    return weights, (weights[..., None, None] * refined).sum(dim=1)
