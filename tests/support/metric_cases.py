"""What tests of the metrics share."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from diffupose import metrics

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
PAIR_METRICS = [metrics.mpjpe, metrics.p_mpjpe, metrics.n_mpjpe, metrics.pck, metrics.auc, metrics.per_joint_error]
SET_METRICS = [metrics.energy_score, metrics.oracle_best_of_hypotheses, metrics.oracle_best_joint_of_hypotheses]
TOTAL_METRICS = [metrics.coverage, metrics.dispersion, metrics.spread_error_correlation]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal float64 numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int) -> Tensor:
    """Return a random proper rotation, float64."""
    q, _ = torch.linalg.qr(randn(3, 3, seed=seed))
    return q * torch.linalg.det(q)


def three_joints(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a prediction and a target with errors of 0, 50 and 130 mm."""
    target = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=dtype)
    # |(0.03, 0.04, 0)| = 0.05 m and |(0.03, 0.04, 0.12)| = sqrt(0.0009 + 0.0016 + 0.0144) = 0.13 m.
    offset = torch.tensor([[0.0, 0.0, 0.0], [0.03, 0.04, 0.0], [0.03, 0.04, 0.12]], dtype=dtype)
    return target + offset, target


def scipy_p_mpjpe(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return the P-MPJPE in millimetres with SciPy's orthogonal Procrustes, reflections undone."""
    x, y = predicted - predicted.mean(0), target - target.mean(0)
    matrix, _ = scipy.linalg.orthogonal_procrustes(x, y)
    if np.linalg.det(matrix) < 0:
        # The best rotation is the best orthogonal map composed with a flip along the weakest singular direction.
        u, _, _ = np.linalg.svd(x.T @ y)
        matrix = u @ np.diag([1.0, 1.0, -1.0]) @ u.T @ matrix
    rotated = x @ matrix
    scale = (rotated * y).sum() / (rotated * rotated).sum()
    return float(1000.0 * np.linalg.norm(scale * rotated - y, axis=1).mean())


def gaussian_case(frames: int, count: int, joints: int, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return hypotheses and targets from one correlated Gaussian per joint, the hypotheses' spread times ``spread``."""
    factor = 0.1 * randn(joints, 3, 3, seed=99)
    center = randn(frames, 1, joints, 3, seed=seed + 1)
    draws = torch.einsum("jcd,bhjd->bhjc", factor, randn(frames, count + 1, joints, 3, seed=seed + 2))
    return center + spread * draws[:, :count], (center + draws[:, count:]).squeeze(1)
