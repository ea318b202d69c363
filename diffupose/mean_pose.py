"""Filling missing joints for models that have no presence channel."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.skeleton import h36m_joints

# Mean of the training motion capture seen through Human3.6M's training cameras at random headings, left and right
# averaged: centre of the box 0, half its longer side 1. Random headings average the torso's width away.
_MEAN_POSE_2D = (
    (0.0, 0.0185), (-0.0004, 0.0186), (-0.0005, 0.4617), (-0.0005, 0.9332), (0.0004, 0.0186), (0.0005, 0.4617),
    (0.0005, 0.9332), (0.0, -0.2944), (0.0, -0.6417), (0.0, -0.8056), (0.0, -0.9692), (0.0008, -0.6296),
    (0.0006, -0.4213), (0.0006, -0.4058), (-0.0008, -0.6296), (-0.0006, -0.4213), (-0.0006, -0.4058),
)  # fmt: skip


def mean_pose_2d(num_joints: int) -> Tensor:
    """Return the mean 2D pose ``[J, 2]`` (y down) of the 17- or 16-joint Human3.6M skeleton.

    Raises:
        ValueError: For another skeleton.
    """
    if num_joints not in (16, 17):
        raise ValueError(f"missing joints can be filled for 16 or 17 joints, got {num_joints}")
    return torch.tensor(_MEAN_POSE_2D)[h36m_joints(num_joints)]


def fill_missing_joints(keypoints_2d: Tensor, present: Tensor) -> Tensor:
    """Replace missing joints by the mean pose, aligned to the present ones by a similarity (least squares).

    Args:
        keypoints_2d: Pixels of shape ``[B, J, 2]``; missing joints may hold anything.
        present: Boolean mask of shape ``[B, J]``, at least two joints each.

    Returns:
        Pixels of shape ``[B, J, 2]``; present joints are unchanged.
    """
    mask = present.unsqueeze(-1)
    weight = mask.to(keypoints_2d.dtype)  # [B, J, 1]
    count = weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    model = mean_pose_2d(keypoints_2d.shape[1]).to(keypoints_2d)  # [J, 2]
    seen = torch.where(mask, keypoints_2d, torch.zeros_like(keypoints_2d))
    model_center = (weight * model).sum(dim=1, keepdim=True) / count  # [B, 1, 2]
    seen_center = seen.sum(dim=1, keepdim=True) / count
    m, p = weight * (model - model_center), weight * (seen - seen_center)
    # A similarity of the plane is one complex factor, conj(m) . p / |m|^2.
    norm = m.square().sum(dim=(1, 2)).clamp(min=1e-12)
    real = (m * p).sum(dim=(1, 2)) / norm
    imaginary = (m[..., 0] * p[..., 1] - m[..., 1] * p[..., 0]).sum(dim=1) / norm
    rotation = torch.stack((real, imaginary, -imaginary, real), dim=-1).unflatten(-1, (2, 2))  # row vectors times this
    aligned = (model - model_center) @ rotation + seen_center  # [B, J, 2]
    return torch.where(mask, keypoints_2d, aligned)
