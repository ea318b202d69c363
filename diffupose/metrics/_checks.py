"""Checks of arguments that the metrics share."""

from __future__ import annotations

import torch
from torch import Tensor

MM_PER_M = 1000.0


def check_float(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is float32 or float64."""
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {value.dtype}")


def check_poses(name: str, value: Tensor, shape: str = "[..., J, 3]", ndim: int | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is a float array of ``shape`` with at least one joint."""
    wrong_rank = value.ndim < 2 if ndim is None else value.ndim != ndim
    if wrong_rank or value.shape[-1] != 3 or value.shape[-2] == 0:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    check_float(name, value)


def check_pair(
    predicted: Tensor, target: Tensor, shape: str = "[..., J, 3]", ndim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return both poses in their common dtype, or raise ``ValueError`` if their shapes are wrong or differ."""
    check_poses("predicted", predicted, shape, ndim)
    check_poses("target", target, shape, ndim)
    if predicted.shape != target.shape:
        raise ValueError(f"target must have the shape of predicted {tuple(predicted.shape)}, got {tuple(target.shape)}")
    dtype = torch.promote_types(predicted.dtype, target.dtype)
    return predicted.to(dtype), target.to(dtype)


def check_hypotheses(hypotheses: Tensor) -> None:
    """Raise ``ValueError`` unless ``hypotheses`` has shape ``[B, H, J, 3]`` with H and J at least 1."""
    check_poses("hypotheses", hypotheses, "[B, H, J, 3]", ndim=4)
    if hypotheses.shape[1] == 0:
        raise ValueError(f"hypotheses must hold at least one hypothesis, got shape {tuple(hypotheses.shape)}")


def check_hypotheses_pair(hypotheses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return hypotheses and target in their common dtype, or raise ``ValueError`` if the shapes do not fit."""
    check_hypotheses(hypotheses)
    check_poses("target", target, "[B, J, 3]", ndim=3)
    frames, _, joints, _ = hypotheses.shape
    if target.shape != (frames, joints, 3):
        raise ValueError(f"target must have shape [{frames}, {joints}, 3], got {tuple(target.shape)}")
    dtype = torch.promote_types(hypotheses.dtype, target.dtype)
    return hypotheses.to(dtype), target.to(dtype)


def without_root(values: Tensor, root_joint: int) -> Tensor:
    """Return ``values`` without entry ``root_joint`` of the last axis, or raise ``ValueError`` if none is left."""
    joints = values.shape[-1]
    if not 0 <= root_joint < joints:
        raise ValueError(f"root_joint must be in 0..{joints - 1}, got {root_joint}")
    if joints == 1:
        raise ValueError("at least one joint besides the root is needed, got 1 joint")
    return torch.cat([values[..., :root_joint], values[..., root_joint + 1 :]], dim=-1)
