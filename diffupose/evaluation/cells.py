"""The data of an evaluation, fixed cells of people, cameras and detector noise; and the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffupose.camera import ASSUMED_FOCAL
from diffupose.conditioning import Conditioning, make_conditioning
from diffupose.config import PARALLEL
from diffupose.datasets.mocap import Mocap
from diffupose.datasets.virtual_cameras import (
    EVALUATION_RANGES,
    EVALUATION_SUBJECTS,
    TRAINING_RANGES,
    TRAINING_SUBJECTS,
    Views,
    choose_views,
    concatenate,
    detect,
    h36m_views,
    turn_heading,
    wild_views,
)
from diffupose.errors import InputError
from diffupose.lifting.lifter import Lifter
from diffupose.lifting.result import LiftResult

Rig = Literal["h36m", "wild"]
RIGS: tuple[Rig, ...] = ("h36m", "wild")
# Random streams, below 1000: that of a rig is its index, that of its noise 500 more; the bank has its own.
_NOISE_STREAM, _BANK_STREAM = 500, 900


@dataclass(frozen=True)
class Cell:
    """One cell of the table: what a detector gives, and the truth.

    Attributes:
        rig, noisy: Which cell.
        views: Keypoints, presence and ground truth.
        source: ``[B]`` collection of each pose.
    """

    rig: Rig
    noisy: bool
    views: Views
    source: np.ndarray

    @property
    def name(self) -> str:
        """As in tables: ``"h36m noisy"``."""
        return f"{self.rig} {'noisy' if self.noisy else 'clean'}"

    @property
    def keypoints(self) -> Tensor:
        """``[B, J, 3]``: pixels and confidence 1 or 0, missing joints NaN."""
        present = self.views.present.unsqueeze(-1)
        return torch.cat((torch.where(present, self.views.keypoints_2d, torch.nan), present.float()), dim=-1)

    def lift(self, lifter: Lifter, keypoints: Tensor | None = None, **settings: Any) -> LiftResult:
        """Lift the cell's keypoints, or others that take their place, without flips."""
        keypoints = self.keypoints if keypoints is None else keypoints
        return lifter(keypoints, image_size=self.views.image_size, flip=False, progress=False, **settings)


def choose_poses(mocap: Mocap, count: int | None, seed: int) -> Mocap:
    """Return ``count`` poses, the same number from each source (the first ones get the remainder); None returns all."""
    if count is None or count >= len(mocap.positions):
        return mocap
    generator = np.random.default_rng(seed)
    sources = np.unique(mocap.source)
    chosen = []
    for rank, source in enumerate(sources):
        index = np.flatnonzero(mocap.source == source)
        share = count // len(sources) + (rank < count % len(sources))
        chosen.append(np.sort(generator.permutation(index)[:share]))
    return mocap.select(np.concatenate(chosen))


def make_cell(mocap: Mocap, rig: Rig, noisy: bool, seed: int = 0) -> Cell:
    """Return a cell: one view of each pose; clean and noisy cells of one rig and seed share their views.

    Views that show less than half of the person are drawn again.

    Raises:
        InputError: If some person is never seen, as when positions are not in metres.
    """
    generator = torch.Generator().manual_seed(1000 * seed + RIGS.index(rig))
    positions = torch.from_numpy(mocap.positions)
    views = _draw(positions, rig, generator)
    for _ in range(100):
        if bool(views.usable.all()):
            break
        views = choose_views([views, _draw(positions, rig, generator)])
    else:
        lost = int(torch.nonzero(~views.usable)[0])
        raise InputError(
            f"no camera of rig {rig!r} saw pose {lost} in 100 draws; its joints span "
            f"{float(np.ptp(mocap.positions[lost], axis=0).max()):.3g} m: are the positions in metres?"
        )
    if noisy:
        noise = torch.Generator().manual_seed(1000 * seed + _NOISE_STREAM + RIGS.index(rig))
        views = detect(views, torch.ones(len(positions)), noise)
    return Cell(rig, noisy, views, mocap.source)


def _draw(positions: Tensor, rig: Rig, generator: torch.Generator) -> Views:
    turned = turn_heading(positions, generator)
    if rig == "h36m":
        return h36m_views(turned, EVALUATION_SUBJECTS, generator)
    return wild_views(turned, EVALUATION_RANGES, generator)


class PoseBank:
    """Training poses as a lifter meets them: the mean pose and the nearest pose by 2D.

    Each training pose is seen once: every other one by a training camera of Human3.6M, the rest by random cameras. Like
    the lifter, the bank does not know the rig. Its poses are those of a camera that looks at the person. They are
    turned back by the assumed focal length, as a lifter's predictions are in the ``raw`` tier.
    """

    def __init__(self, mocap: Mocap, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + _BANK_STREAM)
        turned = turn_heading(torch.from_numpy(mocap.positions), generator)
        views = concatenate(
            h36m_views(turned[::2], TRAINING_SUBJECTS, generator),
            choose_views([wild_views(turned[1::2], TRAINING_RANGES, generator) for _ in range(3)]),
        )
        views = views[views.usable.nonzero().squeeze(1)]
        if not len(views.poses_3d):
            size = float(np.ptp(mocap.positions, axis=1).max())
            raise InputError(
                f"no camera sees anybody of the reference, people of up to {size:.3g} m: are the positions in metres?"
            )
        conditioning = _conditioning(views, views.focal, views.center)
        self.keypoints = conditioning.condition[..., :2]  # [F, J, 2]
        self.poses_3d = conditioning.turn(views.poses_3d)  # [F, J, 3]

    def mean_pose(self, cell: Cell) -> Tensor:
        """Return the mean of the bank for each row of a cell, ``[B, J, 3]``."""
        return self.poses_3d.mean(dim=0) @ _as_assumed(cell.views).rotation

    def nearest_pose(self, cell: Cell) -> Tensor:
        """Return the pose whose keypoints are nearest over the present joints, for each row, ``[B, J, 3]``."""
        bank = self.keypoints.flatten(1)  # [F, 2 J]
        present = cell.views.present.unsqueeze(-1).expand(-1, -1, 2).flatten(1).float()
        conditioning = _as_assumed(cell.views)
        query = conditioning.condition[..., :2].flatten(1) * present
        chosen = []
        for q, mask in zip(query.split(250), present.split(250), strict=True):
            # |q - b|^2 over the mask, without |q|^2, which is the same for the whole bank.
            chosen.append((mask @ bank.square().T - 2.0 * q @ bank.T).argmin(dim=1))
        return self.poses_3d[torch.cat(chosen)] @ conditioning.rotation


def _conditioning(views: Views, focal: Tensor, center: Tensor) -> Conditioning:
    """Return views as a model with ``person`` normalisation gets them."""
    return make_conditioning(views.keypoints_2d, views.present, PARALLEL, focal=focal, center=center)


def _as_assumed(views: Views) -> Conditioning:
    """Return views as they are without intrinsics: the focal length is assumed."""
    return _conditioning(views, ASSUMED_FOCAL * views.image_size.amax(dim=1, keepdim=True), views.image_size / 2)
