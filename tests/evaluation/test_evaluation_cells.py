"""Cells of the evaluation table, and the baselines."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources

import numpy as np
import pytest
import torch

from diffupose.camera import ASSUMED_FOCAL, rotation_to_ray
from diffupose.conditioning import make_conditioning
from diffupose.config import PARALLEL
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, Mocap, load_mocap
from diffupose.datasets.virtual_cameras import (
    TRAINING_RANGES,
    Views,
    choose_views,
    concatenate,
    h36m_views,
    turn_heading,
    wild_views,
)
from diffupose.errors import InputError
from diffupose.evaluation.cells import RIGS, Cell, PoseBank, _draw, choose_poses, make_cell


@pytest.fixture(scope="module")
def people():
    """Forty people of the bundled sample, from three collections."""
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        mocap = load_mocap(path, include=SAMPLE_SUBJECTS).select(np.arange(0, 280, 7))
    return Mocap(mocap.positions, mocap.subject, np.repeat(["b", "a", "c"], (20, 15, 5)))


@pytest.fixture(scope="module")
def training():
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        return load_mocap(path, exclude=SAMPLE_SUBJECTS).select(np.arange(0, 1000, 5))


def many(count):
    """Return numbered poses of three collections with very different sizes, mixed."""
    source = np.random.default_rng(3).permutation(np.repeat(["x", "y", "z"], (count, 2 * count, 5 * count)))
    positions = np.zeros((8 * count, 17, 3), dtype=np.float32)
    positions[:, 0, 0] = np.arange(8 * count)
    return Mocap(positions, np.char.add("of_", source), source)


def same(first, second, names=None):
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in names or [f.name for f in fields(Views)])


class TestChoosePoses:
    def test_a_thousand_poses(self):
        chosen = choose_poses(many(400), 1000, seed=0)
        assert [int((chosen.source == s).sum()) for s in "xyz"] == [334, 333, 333]
        assert len(np.unique(chosen.positions[:, 0, 0])) == 1000  # none twice
        assert (chosen.subject == np.char.add("of_", chosen.source)).all()

    def test_poses_come_from_everywhere(self):
        poses = many(400)
        chosen = choose_poses(poses, 1000, seed=0)
        index = chosen.positions[chosen.source == "z", 0, 0]
        assert np.abs(np.quantile(index / 3200, (0.1, 0.5, 0.9)) - (0.1, 0.5, 0.9)).max() < 0.08

    def test_seed(self):
        first, again, other = (choose_poses(many(50), 30, seed).positions for seed in (0, 0, 1))
        assert np.array_equal(first, again) and not np.array_equal(first, other)

    @pytest.mark.parametrize("count", [None, 80, 1000])
    def test_all(self, count):
        assert np.array_equal(choose_poses(many(10), count, 0).positions, many(10).positions)

    def test_small_sources_give_what_they_have(self):
        assert [(choose_poses(many(2), 12, 0).source == s).sum() for s in "xyz"] == [2, 4, 4]


@pytest.mark.parametrize("rig", RIGS)
class TestMakeCell:
    def test_clean_and_noisy_share_views(self, people, rig):
        clean, noisy = make_cell(people, rig, False), make_cell(people, rig, True)
        truth = [item.name for item in fields(Views) if item.name not in ("keypoints_2d", "present")]
        assert same(clean.views, noisy.views, truth)
        assert clean.views.present.all() and not noisy.views.present.all()
        moved = (noisy.views.keypoints_2d - clean.views.keypoints_2d).abs()
        assert (moved > 0).all() and moved.median() > 0.5
        assert (clean.source == people.source).all()

    def test_seed(self, people, rig):
        first, again, other = (make_cell(people, rig, True, seed).views for seed in (0, 0, 1))
        assert same(first, again)
        assert not torch.equal(first.root, other.root)
        assert not torch.equal(first.present, other.present)

    def test_views_are_usable(self, people, rig):
        cells = [make_cell(people, rig, False, seed) for seed in range(12)]
        assert all(cell.views.usable.all() for cell in cells)

    def test_the_person_is_the_one_asked_for(self, people, rig):
        views = make_cell(people, rig, True).views
        for positions in (people.positions, views.poses_3d.numpy()):
            distances = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
            if positions is people.positions:
                expected = distances
        np.testing.assert_allclose(distances, expected, atol=1e-5)

    def test_keypoints(self, people, rig):
        cell = make_cell(people, rig, True)
        present = cell.views.present
        assert cell.keypoints.shape == (40, 17, 3)
        assert torch.equal(cell.keypoints[..., 2], present.float())
        assert torch.equal(cell.keypoints[present][:, :2], cell.views.keypoints_2d[present])
        assert cell.keypoints[~present][:, :2].isnan().all()

    def test_names(self, people, rig):
        assert [make_cell(people.select(np.arange(2)), rig, noisy).name for noisy in (False, True)] == [
            f"{rig} clean",
            f"{rig} noisy",
        ]

    def test_millimetres_are_refused(self, people, rig):
        wrong = Mocap(1000 * people.positions, people.subject, people.source)
        with pytest.raises(InputError, match=f"no camera of rig '{rig}' saw pose .* are the positions in metres"):
            make_cell(wrong, rig, False)


def test_unusable_views_are_drawn_again(people):
    """Wide arms before near cameras: some first draws show less than half of the person."""
    poses = people.select(np.arange(400) % 40)
    first = _draw(torch.from_numpy(poses.positions), "wild", torch.Generator().manual_seed(1))
    cell = make_cell(poses, "wild", False)
    assert not first.usable.all() and cell.views.usable.all()
    assert same(first[first.usable], cell.views[first.usable])


def reference_normalized(keypoints, present):
    """Return keypoints relative to the box of the present ones, by loops."""
    rows = []
    for points, there in zip(keypoints.double(), present, strict=True):
        low, high = points[there].amin(dim=0), points[there].amax(dim=0)
        rows.append((points - (low + high) / 2) / ((high - low).amax() / 2))
    return torch.stack(rows)


def assumed_turns(cell):
    """Return the rotations that take a camera's axes to those of one that looks at the person, by assumption."""
    turns = []
    for points, present, size in zip(cell.views.keypoints_2d, cell.views.present, cell.views.image_size, strict=True):
        low, high = points[present].amin(dim=0), points[present].amax(dim=0)
        ray = torch.ones(3, dtype=torch.float64)
        ray[:2] = ((low + high) / 2 - size / 2) / (ASSUMED_FOCAL * size.max())
        turns.append(rotation_to_ray(ray))
    return torch.stack(turns)


@pytest.mark.parametrize("rig", RIGS)
class TestPoseBank:
    def test_poses_are_seen_by_a_camera_that_looks_at_the_person(self, training, rig):
        """Keypoints and poses are what a network of person normalisation is trained on."""
        bank = PoseBank(training)
        generator = torch.Generator().manual_seed(900)
        turned = turn_heading(torch.from_numpy(training.positions), generator)
        published = h36m_views(turned[::2], ("S1", "S5", "S6", "S7", "S8"), generator)
        wild = choose_views([wild_views(turned[1::2], TRAINING_RANGES, generator) for _ in range(3)])
        views = concatenate(published[published.usable], wild[wild.usable])
        assert len(views.root) > 0.9 * len(training.positions)
        seen = make_conditioning(views.keypoints_2d, views.present, PARALLEL, focal=views.focal, center=views.center)
        torch.testing.assert_close(bank.keypoints, seen.condition[..., :2])
        torch.testing.assert_close(bank.poses_3d, views.poses_3d @ seen.rotation.mT)

    def test_mean_pose(self, people, training, rig):
        bank, cell = PoseBank(training), make_cell(people, rig, True)
        turns = assumed_turns(cell)
        expected = torch.stack([bank.poses_3d.double().mean(dim=0) @ turn for turn in turns])
        torch.testing.assert_close(bank.mean_pose(cell).double(), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("noisy", [False, True])
    def test_nearest_pose(self, people, training, rig, noisy):
        bank, cell = PoseBank(training), make_cell(people.select(np.arange(260) % 40), rig, noisy)
        query = reference_normalized(cell.views.keypoints_2d, cell.views.present)
        actual = bank.nearest_pose(cell)
        turns = assumed_turns(cell)
        ignored = 0
        for row, present in enumerate(cell.views.present):
            distance = (bank.keypoints.double() - query[row]).square().sum(dim=-1)  # [F, J]
            nearest = distance[:, present].sum(dim=1).argmin()
            torch.testing.assert_close(
                actual[row].double(), bank.poses_3d[nearest].double() @ turns[row], atol=1e-5, rtol=0
            )
            ignored += int(distance.sum(dim=1).argmin() != nearest)
        assert (ignored > 0) == noisy  # the mask decides sometimes

    def test_a_pose_of_the_bank_is_found(self, training, rig):
        bank = PoseBank(training)
        cell = make_cell(training.select(np.arange(30)), rig, False)
        views = {item.name: getattr(cell.views, item.name).clone() for item in fields(Views)}
        views["keypoints_2d"] = 400.0 + 90.0 * bank.keypoints[40:70]
        views["image_size"][:] = 800.0  # its middle is the middle of the person: nothing to turn
        found = bank.nearest_pose(Cell(rig, False, Views(**views), cell.source))
        torch.testing.assert_close(found, bank.poses_3d[40:70], atol=1e-5, rtol=0)

    def test_missing_joints_may_hold_anything(self, people, training, rig):
        bank, cell = PoseBank(training), make_cell(people, rig, True)
        keypoints = torch.where(cell.views.present.unsqueeze(-1), cell.views.keypoints_2d, torch.nan)
        views = Views(**{**{f.name: getattr(cell.views, f.name) for f in fields(Views)}, "keypoints_2d": keypoints})
        blind = Cell(rig, True, views, cell.source)
        assert torch.equal(bank.nearest_pose(blind), bank.nearest_pose(cell))
        assert torch.equal(bank.mean_pose(blind), bank.mean_pose(cell))
