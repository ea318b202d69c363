"""From a path to a source of batches."""

from __future__ import annotations

import zipfile

import numpy as np
import torch

from diffupose.config import LifterConfig
from diffupose.datasets.h36m import TRAIN_SUBJECTS, load_h36m
from diffupose.datasets.mocap import load_mocap
from diffupose.errors import InputError
from diffupose.skeleton import SKELETONS
from diffupose.training.batches import Batches, MocapBatches
from diffupose.training.config import TrainConfig
from diffupose.training.h36m_batches import H36MBatches


def is_h36m(path: str) -> bool:
    """Return whether a file is the community's ``data_3d_h36m.npz`` (it holds ``positions_3d``).

    Raises:
        InputError: If the file is not an npz.
        FileNotFoundError: If there is none.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a plain array")
        with archive:
            return "positions_3d" in archive.files
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise InputError(f"data must be an npz, {path} is not: {error}") from None


def open_batches(config: TrainConfig, model: LifterConfig, device: torch.device) -> Batches:
    """Return the batches of the data that ``config.data`` names.

    Raises:
        InputError: If there is no data, or it does not fit the model.
    """
    if not config.data:
        raise InputError("data must name a motion-capture npz or data_3d_h36m.npz, got nothing (--data FILE)")
    if is_h36m(config.data):
        sequences = load_h36m(
            config.data, config.keypoints, subjects=TRAIN_SUBJECTS, skeleton=SKELETONS[model.denoiser.skeleton]
        )
        return H36MBatches(sequences, model, config, device)
    if config.keypoints is not None:
        raise InputError("keypoints go with Human3.6M data; motion capture is seen through virtual cameras")
    return MocapBatches(load_mocap(config.data, exclude=config.exclude_subjects), model, config, device)
