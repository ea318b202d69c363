"""The validation curve: a small evaluation on people who are not trained on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffupose.config import LifterConfig
from diffupose.datasets.mocap import load_mocap
from diffupose.errors import InputError
from diffupose.evaluation.cells import RIGS, choose_poses, make_cell
from diffupose.evaluation.mocap import score_hypotheses
from diffupose.lifting.lifter import Lifter
from diffupose.networks.build import LifterFile
from diffupose.training.config import TrainConfig

_NUM_POSES, _NUM_HYPOTHESES, _MOST_STEPS = 400, 5, 10


class Validation:
    """Noisy cells of both rigs on the excluded subjects."""

    def __init__(self, config: TrainConfig) -> None:
        if not config.exclude_subjects:
            raise InputError("validate_every needs people to validate on: exclude_subjects is empty")
        mocap = choose_poses(load_mocap(config.data, include=config.exclude_subjects), _NUM_POSES, seed=0)
        self.cells = [make_cell(mocap, rig, noisy=True) for rig in RIGS]

    def score(
        self, denoiser: nn.Module, model: LifterConfig, pose_mean: Tensor, pose_scale: Tensor
    ) -> dict[str, float]:
        """Return the mean error of the mean of a few hypotheses, in millimetres, per rig."""
        file = LifterFile(model, copy.deepcopy(denoiser), pose_mean, pose_scale, torch.ones(pose_mean.shape[0]))
        lifter = Lifter(file, pose_mean.device)
        scores = {}
        for cell in self.cells:
            steps = min(_MOST_STEPS, model.sampling.num_inference_steps)
            result = cell.lift(lifter, num_hypotheses=_NUM_HYPOTHESES, num_inference_steps=steps)
            values = score_hypotheses(result.hypotheses.cpu(), cell, lifter.covariance_scale.cpu())
            scores[f"val_{cell.rig}_mm"] = values["mpjpe"]
        return scores
