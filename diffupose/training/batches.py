"""Training batches, drawn on the training device. A batch depends on the seed and the step only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffupose.conditioning import make_conditioning
from diffupose.config import LifterConfig
from diffupose.datasets.exchange_limbs import exchange_limbs
from diffupose.datasets.mocap import Mocap
from diffupose.datasets.virtual_cameras import (
    EVALUATION_RANGES,
    TRAINING_RANGES,
    TRAINING_SUBJECTS,
    choose_views,
    concatenate,
    detect,
    h36m_views,
    turn_heading,
    uniform,
    vary_bodies,
    wild_views,
)
from diffupose.skeleton import SKELETONS, h36m_joints
from diffupose.training.config import TrainConfig

# Streams of random numbers of a step, and of the shuffles.
DATA_STREAM, NOISE_STREAM, SHUFFLE_STREAM = range(3)


@dataclass(frozen=True)
class TrainBatch:
    """``condition [B, J, C]`` for the denoiser and ``poses_3d [B, J, 3]`` in metres, in the frame it predicts in."""

    condition: Tensor
    poses_3d: Tensor

    def __getitem__(self, index: slice) -> TrainBatch:
        """Return a slice of the batch."""
        return TrainBatch(self.condition[index], self.poses_3d[index])


class Batches(Protocol):
    """A source of training batches."""

    num_samples: int

    def batch(self, step: int, batch_size: int | None = None) -> TrainBatch:
        """Return the whole batch of a step, over all processes, or another ``batch_size``."""


def step_generator(seed: int, stream: int, step: int, device: torch.device) -> torch.Generator:
    """Return a generator that depends on (seed, stream, step) only, so that a run can resume anywhere."""
    # splitmix64: neighbouring steps get unrelated seeds.
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + step * 0x8CB92BA72F3D8DD7) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return torch.Generator(device).manual_seed((mixed ^ (mixed >> 31)) >> 1)


class Shuffle:
    """The sample at each position of an endless sequence of epochs; each epoch has its own order."""

    def __init__(self, num_samples: int, seed: int, weights: Tensor | None = None) -> None:
        self.num_samples, self.seed, self.weights = num_samples, seed, weights
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def order(self, epoch: int) -> Tensor:
        """Return the sample indices of an epoch, ``[F]``: a permutation, or weighted draws."""
        if epoch != self._epoch:
            generator = step_generator(self.seed, SHUFFLE_STREAM, epoch, torch.device("cpu"))
            if self.weights is None:
                self._order = torch.randperm(self.num_samples, generator=generator)
            else:
                self._order = torch.multinomial(self.weights, self.num_samples, replacement=True, generator=generator)
            self._epoch = epoch
        return self._order

    def indices(self, step: int, batch_size: int) -> Tensor:
        """Return the samples of a step, ``[batch_size]``; a batch may reach into the next epoch."""
        parts, position = [], step * batch_size
        end = position + batch_size
        while position < end:
            epoch, start = divmod(position, self.num_samples)
            count = min(end - position, self.num_samples - start)
            parts.append(self.order(epoch)[start : start + count])
            position += count
        return torch.cat(parts)


def subject_weights(subjects: np.ndarray) -> Tensor:
    """Return a weight for each sample: the inverse square root of how many its subject has."""
    _, inverse, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    return torch.from_numpy(counts[inverse] ** -0.5)


class MocapBatches:
    """Motion capture through virtual cameras, half ``h36m`` and half ``wild``, with bodies and noise varied."""

    def __init__(self, mocap: Mocap, model: LifterConfig, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.num_samples = len(mocap.positions)
        self.positions = torch.from_numpy(mocap.positions).to(device)
        weights = None
        if config.balance_subjects:
            weights = subject_weights(mocap.subject)
        self.shuffle = Shuffle(self.num_samples, config.seed, weights)

    def batch(self, step: int, batch_size: int | None = None) -> TrainBatch:
        """Return the whole batch of a step, over all processes."""
        index = self.shuffle.indices(step, batch_size or self.config.batch_size).to(self.device)
        return self.draw(index, step_generator(self.config.seed, DATA_STREAM, step, self.device))

    def draw(self, index: Tensor, generator: torch.Generator) -> TrainBatch:
        """Return samples ``index [B]`` seen by cameras drawn from ``generator``."""
        config = self.config
        positions = self.positions[index]
        if config.exchange_limbs:
            positions = exchange_limbs(positions, generator, config.exchange_limbs)
        if config.vary_bodies:
            positions = vary_bodies(positions, generator, mirror=config.mirror)
        elif config.mirror:
            positions = vary_bodies(positions, generator, body_sd=0.0, bone_sd=0.0)
        positions = turn_heading(positions, generator)
        half = len(index) // 2
        ranges = TRAINING_RANGES if config.vary_cameras else EVALUATION_RANGES
        # Samples are shuffled, so two halves are as good as a draw for each person.
        published = choose_views([h36m_views(positions[:half], TRAINING_SUBJECTS, generator)])
        wild = choose_views([wild_views(positions[half:], ranges, generator) for _ in range(3)])
        views = concatenate(published, wild)
        # Some people get no noise: clean keypoints must work, too.
        level = (uniform(generator, len(index)) * 1.15 - 0.15).clamp(min=0.0)
        most_missing = config.noise_scale if config.missing_scale is None else config.missing_scale
        if config.noise_scale > 0 or most_missing > 0:
            missing = most_missing * level
            views = detect(
                views, config.noise_scale * level, generator, missing_scale=missing, drop_outside=missing > 0
            )
        conditioning = make_conditioning(
            views.keypoints_2d,
            views.present,
            self.model,
            image_size=views.image_size,
            focal=views.focal,
            center=views.center,
            # Half of the people have no cue, so that the model works without it.
            camera_known=uniform(generator, len(index)) < 0.5 if self.model.denoiser.camera_cue else False,
        )
        joints = h36m_joints(SKELETONS[self.model.denoiser.skeleton].num_joints)
        return TrainBatch(conditioning.condition[:, joints], conditioning.turn(views.poses_3d)[:, joints])


def pose_statistics(batches: Batches) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per joint and axis ``[J, 3]``, in metres, over some of the training data.

    Deviations are at least 5 cm: the root never moves, and the poses are divided by them.
    """
    # The batch size is fixed: with that of a run of few samples a step, this would take minutes.
    poses = torch.cat([batches.batch(step, 1_000).poses_3d for step in range(50)])
    return poses.mean(dim=0), poses.std(dim=0).clamp(min=0.05)
