"""Scores of a lifter on the cells of an evaluation.

Tier ``raw`` has no intrinsics, tier ``camera`` has them. In neither does the lifter see the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffupose.camera import undistort
from diffupose.datasets.mocap import Mocap
from diffupose.evaluation.cells import RIGS, Cell, PoseBank, choose_poses, make_cell
from diffupose.lifting.aggregation import mean_by_reprojection, refine_by_reprojection
from diffupose.lifting.lifter import Lifter
from diffupose.metrics import (
    DEFAULT_LEVELS,
    coverage,
    dispersion,
    energy_score,
    expected_calibration_error,
    mean_of_hypotheses,
    mpjpe,
    oracle_best_of_hypotheses,
    p_mpjpe,
    spread_error_correlation,
)
from diffupose.skeleton import h36m_joints

POSES_PER_CELL = 1000
Tier = Literal["raw", "camera"]
TIERS: tuple[Tier, ...] = ("raw", "camera")


def score_poses(predicted: Tensor, cell: Cell) -> dict[str, Any]:
    """Return the errors of one pose per row, in millimetres, all together and by source."""
    truth = _truth(predicted, cell)
    error = mpjpe(predicted, truth)
    return {
        "mpjpe": float(error.mean()),
        "p_mpjpe": float(p_mpjpe(predicted, truth).mean()),
        "mpjpe_by_source": {
            str(source): float(error[torch.from_numpy(cell.source == source)].mean())
            for source in np.unique(cell.source)
        },
    }


def score_hypotheses(hypotheses: Tensor, cell: Cell, covariance_scale: Tensor) -> dict[str, Any]:
    """Return ``score_poses`` of the mean, and the scores of the whole set of hypotheses ``[B, H, J, 3]``."""
    truth = _truth(hypotheses, cell)
    scores = score_poses(mean_of_hypotheses(hypotheses), cell)
    scores["energy_score"] = float(energy_score(hypotheses, truth).mean())
    scores["oracle_best_of_n"] = float(oracle_best_of_hypotheses(hypotheses, truth).mean())
    if hypotheses.shape[1] >= 4:
        reached = coverage(hypotheses, truth, scale=covariance_scale)  # [L, J]
        ece, worst = expected_calibration_error(reached)
        by_level = dict(zip((round(level, 2) for level in DEFAULT_LEVELS), reached[:, 1:].mean(dim=1), strict=True))
        calibration = {
            "ece": ece,
            "ece_worst_joint": worst,
            "dispersion": dispersion(hypotheses, truth),
            "spearman": spread_error_correlation(hypotheses, truth),
            "coverage_50": by_level[0.5],
            "coverage_90": by_level[0.9],
        }
        # Without any spread the dispersion is infinite and the correlation undefined, which JSON cannot hold.
        scores |= {name: float(value) if bool(value.isfinite()) else None for name, value in calibration.items()}
    return scores


def evaluate_mocap(
    lifter: Lifter,
    mocap: Mocap,
    reference: Mocap | None,
    *,
    tier: Tier = "raw",
    regressor: Lifter | None = None,
    num_hypotheses: Sequence[int] = (1, 10),
    num_poses: int | None = POSES_PER_CELL,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[Cell]], Iterable[Cell]] = iter,
) -> dict[str, Any]:
    """Score a lifter on both rigs, clean and noisy.

    Args:
        lifter: The model.
        mocap: Poses to evaluate on.
        reference: Training poses for the baselines (mean pose, nearest pose by 2D), or None for no baselines.
        tier: ``"raw"``, or ``"camera"``: the intrinsics are given (lens distortion removed), and rows ``refined`` hold
            ``aggregation.mean_by_reprojection`` and the refined hypotheses.
        regressor: A deterministic model to compare with, or None.
        num_hypotheses: Values of N; the hypotheses of a smaller N are the first of a larger one. No flips.
        num_poses: Poses per cell, equally from each source; None takes all.
        num_inference_steps: Steps; default from the checkpoint.
        seed: Seed of poses, views, noise and hypotheses.
        progress: Wraps the iteration over cells.

    Returns:
        ``{"settings": ..., "cells": {cell: {row: scores}}}``, ready for JSON; errors in millimetres.

    Raises:
        ValueError: If an argument does not fit, before any long work.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")
    if regressor is not None and not regressor.config.diffusion.deterministic:
        raise ValueError("regressor must be a deterministic model, got one that samples")
    if not num_hypotheses or min(num_hypotheses) < 1:
        raise ValueError(f"num_hypotheses must hold numbers of at least 1, got {list(num_hypotheses)}")
    if num_poses is not None and num_poses < 1:
        raise ValueError(f"num_poses must be at least 1, or None for all, got {num_poses}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and 2^32 - 1, got {seed}")
    lifter.step_table(lifter.sampling(num_inference_steps=num_inference_steps))
    poses = choose_poses(mocap, num_poses, seed)
    cells = [make_cell(poses, rig, noisy, seed) for rig in RIGS for noisy in (False, True)]
    bank = None if reference is None else PoseBank(reference)
    rows: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for cell in progress(cells):
        keypoints, intrinsics = (cell.keypoints, None) if tier == "raw" else undistorted(cell)
        steps = {"num_inference_steps": num_inference_steps, "seed": seed}
        result = cell.lift(lifter, keypoints, intrinsics=intrinsics, num_hypotheses=max(num_hypotheses), **steps)
        settings = result.meta
        hypotheses, scale = result.hypotheses.cpu(), lifter.covariance_scale.cpu()
        scores = {}
        for n in num_hypotheses:
            scores[f"N={n}"] = score_hypotheses(hypotheses[:, :n], cell, scale)
            if intrinsics is not None:
                row = (hypotheses[:, :n], result.keypoints_2d, result.confidence, intrinsics)
                scores[f"N={n} refined"] = {
                    **score_hypotheses(refine_by_reprojection(*row), cell, scale),
                    **score_poses(mean_by_reprojection(*row), cell),
                }
        if regressor is not None:
            poses_3d = cell.lift(regressor, keypoints, intrinsics=intrinsics, num_hypotheses=1).mean.cpu()
            scores["regressor"] = score_poses(poses_3d, cell)
        if bank is not None:
            joints = h36m_joints(lifter.skeleton.num_joints)
            scores["mean pose"] = score_poses(bank.mean_pose(cell)[:, joints], cell)
            scores["nearest 2D pose"] = score_poses(bank.nearest_pose(cell)[:, joints], cell)
        rows[cell.name] = scores
    return {
        "tier": tier,
        "ground_truth": "motion-capture joints, root-relative, used for scoring only (and by rows named oracle)",
        "settings": {**settings, "num_hypotheses": list(num_hypotheses)},
        "num_poses": len(poses.positions),
        "num_reference_poses": 0 if reference is None else len(reference.positions),
        "num_joints": lifter.skeleton.num_joints,
        "seed": seed,
        "cells": rows,
    }


def format_table(scores: dict[str, Any]) -> str:
    """Return the scores as a Markdown table, errors in millimetres."""
    sources = sorted({s for rows in scores["cells"].values() for r in rows.values() for s in r["mpjpe_by_source"]})
    calibration = {"ECE": "ece", "disp.": "dispersion", "rho": "spearman"}
    header = ["cell", "pose", "MPJPE", "P-MPJPE", "energy", "oracle best", *calibration, *sources]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for cell, rows in scores["cells"].items():
        for name, row in rows.items():
            values = [row.get(key) for key in ("mpjpe", "p_mpjpe", "energy_score", "oracle_best_of_n")]
            text = ["" if value is None else f"{value:.1f}" for value in values]
            uncertainty = (row.get(key) for key in calibration.values())
            text += ["" if value is None else f"{value:.3f}" for value in uncertainty]
            label = f"mean of {name}" if name.startswith("N=") and name != "N=1" else name
            lines.append([cell, label, *text, *(f"{row['mpjpe_by_source'][source]:.1f}" for source in sources)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    sides = ["<", "<", *">" * (len(header) - 2)]
    padded = (
        [f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True)] for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def undistorted(cell: Cell) -> tuple[Tensor, Tensor]:
    """Return a cell's keypoints ``[B, J, 3]`` with the lens distortion removed, and camera matrices ``[B, 3, 3]``."""
    views, keypoints = cell.views, cell.keypoints
    pixels = undistort(keypoints[..., :2], views.focal, views.center, views.radial, views.tangential)
    matrices = torch.zeros(len(keypoints), 3, 3)
    matrices[:, [0, 1], [0, 1]], matrices[:, :2, 2], matrices[:, 2, 2] = views.focal, views.center, 1.0
    return torch.cat((pixels, keypoints[..., 2:]), dim=-1), matrices


def _truth(predicted: Tensor, cell: Cell) -> Tensor:
    """Return the truth ``[B, J, 3]`` in the joints of a prediction ``[..., J, 3]`` of 16 or 17."""
    return cell.views.poses_3d[:, h36m_joints(predicted.shape[-2])]
