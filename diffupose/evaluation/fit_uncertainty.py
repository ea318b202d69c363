"""Calibrate a model's uncertainty on people that it was not fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffupose.conditioning import make_conditioning
from diffupose.datasets.mocap import Mocap
from diffupose.evaluation.cells import RIGS, Cell, choose_poses, make_cell
from diffupose.lifting.lifter import Lifter
from diffupose.metrics import DEFAULT_LEVELS, covariance_of_hypotheses, mean_of_hypotheses
from diffupose.metrics.calibration import level_of_distance, squared_distance
from diffupose.schedule import step_table

NUM_HYPOTHESES = 50
_NUM_TIMESTEPS, _NUM_DRAWS = 24, 4
_FACTORS = np.geomspace(0.2, 10.0, 161)  # 2.5 % apart


def calibration_cells(mocap: Mocap, num_poses: int, seed: int = 0) -> list[Cell]:
    """Return noisy cells of both rigs."""
    poses = choose_poses(mocap, num_poses, seed)
    return [make_cell(poses, rig, True, seed) for rig in RIGS]


@torch.no_grad()
def measure_prediction_error(lifter: Lifter, cells: Sequence[Cell], seed: int = 0) -> Tensor:
    """Return the mean squared error of the predicted x0 at every timestep, for each joint and axis.

    It is measured at 24 timesteps and interpolated between them; left and right share theirs.

    Args:
        lifter: The model.
        cells: What the detector saw, with the truth.
        seed: Seed of the noise.

    Returns:
        ``[T, J, 3]`` float32, in data units: what ``step_table`` takes as ``prediction_error``.
    """
    config, schedule = lifter.config, lifter.schedule
    last = schedule.num_train_timesteps - 1
    grid = np.unique(np.round(np.linspace(0.0, 1.0, _NUM_TIMESTEPS) ** 2 * last).astype(np.int64))
    # x0 = p x_t + q output at timestep 0, 1, ...
    table = step_table(schedule, schedule.num_train_timesteps, prediction_type=config.diffusion.prediction_type)
    to_x0 = table.coefficients[::-1, :2].tolist()
    generator = torch.Generator(lifter.device).manual_seed(seed)
    total = np.zeros((len(grid), lifter.skeleton.num_joints, 3))
    for cell in cells:
        views = cell.views
        conditioning = make_conditioning(
            views.keypoints_2d, views.present, config,
            image_size=views.image_size, focal=views.focal, center=views.center,
        )  # fmt: skip
        condition = conditioning.condition.to(lifter.device)
        poses = conditioning.turn(views.poses_3d).to(lifter.device)
        x0 = (poses - lifter.pose_mean) / lifter.pose_scale  # [B, J, 3]
        for index, timestep in enumerate(grid):
            steps = torch.full((len(x0),), int(timestep), device=lifter.device)
            p, q = to_x0[timestep]
            for _ in range(_NUM_DRAWS):
                noise = torch.randn(x0.shape, generator=generator, device=lifter.device)
                noisy = schedule.add_noise(x0, noise, steps)
                output = lifter.denoiser(noisy, condition, steps)[..., :3]
                error = (p * noisy + q * output - x0).square().mean(dim=0).double().cpu().numpy()  # [J, 3]
                total[index] += error / (_NUM_DRAWS * len(cells))
    total = 0.5 * (total + total[:, list(lifter.skeleton.flip_permutation)])
    # Logarithms are interpolated: with prediction type epsilon the error spans orders of magnitude.
    logarithms = np.log(total.clip(1e-12)).reshape(len(grid), -1)
    every = np.stack([np.interp(np.arange(last + 1), grid, column) for column in logarithms.T], axis=-1)
    return torch.from_numpy(np.exp(every).reshape(last + 1, *total.shape[1:])).float()


def fit_covariance_scale(lifter: Lifter, cells: Sequence[Cell], num_hypotheses: int = NUM_HYPOTHESES) -> Tensor:
    """Return one factor per joint ``[J]`` that brings the coverage of the covariance's regions nearest to nominal.

    The factor minimises the joint's largest |empirical - nominal| over the levels 0.05 ... 0.95, over all cells, at the
    model's default sampler and steps. The root's factor is 1. Errors have heavier tails than a normal distribution, so
    the smallest mean difference would leave the regions of high levels too small.
    """
    distances = []
    for cell in cells:
        hypotheses = cell.lift(lifter, num_hypotheses=num_hypotheses).hypotheses.cpu().double()
        mean, covariance = mean_of_hypotheses(hypotheses), covariance_of_hypotheses(hypotheses)
        distances.append(squared_distance(cell.views.poses_3d.double() - mean, covariance))
    distance = torch.cat(distances)  # [B, J]
    levels = torch.tensor(DEFAULT_LEVELS, dtype=torch.float64)[:, None, None]
    errors = []
    for factor in _FACTORS:
        inside = level_of_distance(distance / factor, num_hypotheses) <= levels  # [L, B, J]
        errors.append((inside.double().mean(dim=1) - levels[:, 0]).abs().amax(dim=0))
    best = torch.stack(errors).argmin(dim=0)
    at_the_end = int(((best == 0) | (best == len(_FACTORS) - 1))[1:].sum())
    if at_the_end:
        warnings.warn(
            f"the factors of {at_the_end} joints lie at the end of what is tried, {_FACTORS[0]:g} to {_FACTORS[-1]:g}: "
            "their regions stay wrong",
            stacklevel=2,
        )
    scale = torch.from_numpy(_FACTORS)[best].float()
    scale[0] = 1.0
    return scale
