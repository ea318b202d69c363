"""Exchange of limbs: whose directions, whose lengths, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.training_runs import stick_figures

from diffupose.datasets.exchange_limbs import exchange_limbs
from diffupose.skeleton import H36M_17

LEFT_ARM, RIGHT_ARM, LEGS, TRUNK = (12, 13), (15, 16), (2, 3, 5, 6), (0, 1, 4, 7, 8, 9, 10, 11, 14)


@pytest.fixture
def people():
    poses = stick_figures(40, np.random.default_rng(0))
    angle = np.random.default_rng(1).uniform(0, 2 * np.pi, 40)
    turned = poses.copy()
    turned[..., 0] = np.cos(angle)[:, None] * poses[..., 0] - np.sin(angle)[:, None] * poses[..., 1]
    turned[..., 1] = np.sin(angle)[:, None] * poses[..., 0] + np.cos(angle)[:, None] * poses[..., 1]
    return torch.from_numpy(turned)


def bones(poses):
    return poses - poses[:, [max(parent, 0) for parent in H36M_17.parents]]


def local(poses, pair):
    """Bones as seen by somebody who faces along the normal of the line between two joints; NumPy, on its own."""
    result = bones(poses).numpy()
    line = (poses[:, pair[1]] - poses[:, pair[0]]).numpy()
    angle = -np.arctan2(line[:, 1], line[:, 0])[:, None]
    x, y = result[..., 0].copy(), result[..., 1].copy()
    result[..., 0], result[..., 1] = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    return result / np.linalg.norm(result, axis=-1, keepdims=True).clip(1e-9)


def test_never(people):
    assert torch.allclose(exchange_limbs(people, torch.Generator().manual_seed(0), 0.0), people, atol=1e-12)


def test_always(people):
    exchanged = exchange_limbs(people, torch.Generator().manual_seed(0), 1.0)
    torch.testing.assert_close(bones(exchanged).norm(dim=-1), bones(people).norm(dim=-1))  # one's own lengths
    assert torch.allclose(exchanged[:, TRUNK], people[:, TRUNK])
    donors = []
    for limb, pair in ((LEFT_ARM, (14, 11)), (RIGHT_ARM, (14, 11)), (LEGS, (1, 4))):
        before, after = local(people, pair)[:, limb], local(exchanged, pair)[:, limb]
        distance = np.abs(after[:, None] - before[None]).max(axis=(2, 3))  # [B, B]
        assert distance.min(axis=1).max() < 1e-6  # everybody's limb points as somebody's did
        donors.append(distance.argmin(axis=1))
        assert sorted(donors[-1]) == list(range(40))
    assert len({tuple(donor) for donor in donors}) == 3  # each limb has a donor of its own


def test_sometimes(people):
    exchanged = exchange_limbs(people.repeat(50, 1, 1), torch.Generator().manual_seed(0), 0.25)
    moved = (exchanged - people.repeat(50, 1, 1)).norm(dim=-1) > 1e-6
    for limb in (LEFT_ARM, RIGHT_ARM, LEGS):
        assert float(moved[:, limb].any(dim=1).double().mean()) == pytest.approx(0.25, abs=0.04)
    assert not moved[:, TRUNK].any()
    again = exchange_limbs(people.repeat(50, 1, 1), torch.Generator().manual_seed(0), 0.25)
    assert torch.equal(exchanged, again)
