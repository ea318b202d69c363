"""From a path to a source of batches."""

from __future__ import annotations

import torch

from diffupose.config import LifterConfig
from diffupose.datasets.mocap import load_mocap
from diffupose.errors import InputError
from diffupose.training.batches import Batches, MocapBatches
from diffupose.training.config import TrainConfig


def open_batches(config: TrainConfig, model: LifterConfig, device: torch.device) -> Batches:
    """Return the batches of the data that ``config.data`` names."""
    if not config.data:
        raise InputError("data must name a motion-capture npz or data_3d_h36m.npz, got nothing")
    mocap = load_mocap(config.data, exclude=config.exclude_subjects)
    return MocapBatches(mocap, model, config, device)
