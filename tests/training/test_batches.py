"""Training batches: order, cameras, augmentation and missing joints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffupose.config import PAPER, PARALLEL
from diffupose.datasets.cameras_h36m import H36M_CAMERAS
from diffupose.datasets.h36m import H36MSequence, load_h36m
from diffupose.datasets.mocap import load_mocap
from diffupose.datasets.virtual_cameras import turn_heading, vary_bodies
from diffupose.errors import InputError
from diffupose.skeleton import H36M_16, H36M_17
from diffupose.training import batches
from diffupose.training.batches import MocapBatches, Shuffle, pose_statistics, step_generator
from diffupose.training.config import TrainConfig
from diffupose.training.h36m_batches import H36MBatches

CPU = torch.device("cpu")
MIRROR = torch.tensor([-1.0, 1.0, 1.0])


def with_joints(preset, num_joints):
    return replace(preset, denoiser=replace(preset.denoiser, skeleton=f"h36m_{num_joints}"))


class TestShuffle:
    def test_every_epoch_is_a_permutation_of_its_own(self):
        shuffle = Shuffle(101, seed=0)
        orders = [shuffle.order(epoch).tolist() for epoch in range(4)]
        for order in orders:
            assert sorted(order) == list(range(101))
            assert order != sorted(order)
        assert len({tuple(order) for order in orders}) == 4
        assert Shuffle(101, seed=1).order(0).tolist() != orders[0]

    @pytest.mark.parametrize("batch_size", [4, 7, 10, 25])
    def test_batches_are_the_epochs_end_to_end(self, batch_size):
        shuffle = Shuffle(10, seed=0)
        endless = torch.cat([Shuffle(10, seed=0).order(epoch) for epoch in range(10)])
        for step in range(100 // batch_size):
            expected = endless[step * batch_size : (step + 1) * batch_size]
            assert shuffle.indices(step, batch_size).tolist() == expected.tolist()

    def test_resumes_anywhere(self):
        one = Shuffle(23, seed=5)
        straight = [one.indices(step, 8).tolist() for step in range(20)]
        for step in (19, 3, 11):
            assert Shuffle(23, seed=5).indices(step, 8).tolist() == straight[step]

    def test_weights(self):
        weights = torch.cat((torch.full((100,), 1.0), torch.full((50,), 4.0)))
        drawn = torch.cat([Shuffle(150, 0, weights).order(epoch) for epoch in range(200)])
        assert abs(float((drawn >= 100).double().mean()) - 200 / 300) < 0.01
        counts = torch.bincount(drawn, minlength=150).double()
        assert float(counts[100:].min()) > 2.5 * float(counts[:100].mean())

    def test_step_generators_differ(self):
        numbers = {
            torch.randint(2**62, (1,), generator=step_generator(seed, stream, step, CPU)).item()
            for seed in (0, 1, 2**40) for stream in range(4) for step in range(50)
        }  # fmt: skip
        assert len(numbers) == 3 * 4 * 50


@pytest.fixture
def mocap(mocap_path):
    return load_mocap(mocap_path)


@pytest.fixture
def make_batches(mocap):
    def make(model=PARALLEL, **settings):
        return MocapBatches(mocap, model, TrainConfig(**{"batch_size": 64, **settings}), CPU)

    return make


@pytest.fixture
def views_of(monkeypatch):
    """Return the clean views that a batch of motion capture was made of, beside the batch."""

    def draw(source, step=0):
        seen = []

        def record(first, second):
            seen.append(original(first, second))
            return seen[-1]

        original = batches.concatenate
        with monkeypatch.context() as patch:
            patch.setattr(batches, "concatenate", record)
            batch = source.batch(step)
        return batch, seen[0]

    return draw


class TestMocap:
    @pytest.mark.parametrize("model", [PAPER, PARALLEL], ids=["paper", "parallel"])
    def test_depends_on_seed_and_step(self, make_batches, model):
        source = make_batches(model)
        first = source.batch(3)
        source.batch(4)
        again, fresh = source.batch(3), make_batches(model).batch(3)
        for batch in (again, fresh):
            assert torch.equal(batch.condition, first.condition) and torch.equal(batch.poses_3d, first.poses_3d)
        for other in (source.batch(4), make_batches(model, seed=1).batch(3)):
            different = (other.poses_3d - first.poses_3d).flatten(1).norm(dim=1)
            assert (different > 0.05).float().mean() > 0.9
            assert not torch.equal(other.condition, first.condition)

    def test_does_not_touch_the_global_generator(self, make_batches):
        before = torch.get_rng_state()
        make_batches().batch(0)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(("model", "channels"), [(PAPER, 2), (PARALLEL, 3)], ids=["paper", "parallel"])
    @pytest.mark.parametrize("num_joints", [17, 16])
    @pytest.mark.parametrize("batch_size", [1, 5, 64])
    def test_shapes(self, make_batches, model, channels, num_joints, batch_size):
        batch = make_batches(with_joints(model, num_joints), batch_size=batch_size).batch(0)
        assert batch.condition.shape == (batch_size, num_joints, channels)
        assert batch.poses_3d.shape == (batch_size, num_joints, 3)
        assert torch.isfinite(batch.condition).all() and torch.isfinite(batch.poses_3d).all()
        assert not batch.poses_3d[:, 0].any()

    def test_16_joints_are_17_without_the_neck(self, make_batches):
        keep = [joint for joint in range(17) if joint != 9]
        all_joints, fewer = make_batches().batch(0), make_batches(with_joints(PARALLEL, 16)).batch(0)
        assert torch.equal(fewer.poses_3d, all_joints.poses_3d[:, keep])
        assert torch.equal(fewer.condition, all_joints.condition[:, keep])

    def test_target_is_seen_in_the_direction_of_the_box(self, make_batches, views_of):
        batch, views = views_of(make_batches(noise_scale=0.0))
        pixels = views.keypoints_2d.double().numpy()
        low, high = pixels.min(axis=1), pixels.max(axis=1)
        center, half = (low + high) / 2, (high - low).max(axis=1) / 2
        # Inputs: shifted and scaled, nothing else.
        inputs = (pixels - center[:, None]) / half[:, None, None]
        np.testing.assert_allclose(batch.condition[..., :2].numpy(), inputs, atol=1e-4)
        for row in range(len(pixels)):
            # The turned pose and the turned root, seen by the same camera turned back, fall on the inputs' pixels.
            ray = np.append((center[row] - views.center[row].numpy()) / views.focal[row].numpy(), 1.0)
            ray /= np.linalg.norm(ray)
            axis = np.cross(ray, (0.0, 0.0, 1.0))
            cross = np.cross(np.eye(3), axis)  # cross @ v is axis x v
            turn = np.eye(3) + cross + cross @ cross / (1.0 + ray[2])
            np.testing.assert_allclose(turn @ ray, (0.0, 0.0, 1.0), atol=1e-12)
            np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
            points = batch.poses_3d[row].double().numpy() @ turn + views.root[row].double().numpy()
            x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
            r2 = x**2 + y**2
            k, p = views.radial[row].double().numpy(), views.tangential[row].double().numpy()
            factor = 1 + k[0] * r2 + k[1] * r2**2 + k[2] * r2**3 + p[0] * x + p[1] * y
            seen = np.stack((x * factor + p[0] * r2, y * factor + p[1] * r2), axis=-1)
            seen = seen * views.focal[row].double().numpy() + views.center[row].double().numpy()
            np.testing.assert_allclose((seen - center[row]) / half[row], inputs[row], atol=2e-3)

    def test_image_normalization(self, make_batches, views_of):
        batch, views = views_of(make_batches(PAPER, noise_scale=0.0))
        size = views.image_size.unsqueeze(1)
        expected = 2.0 * views.keypoints_2d / size[..., :1] - size / size[..., :1]
        torch.testing.assert_close(batch.condition, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.poses_3d, views.poses_3d)

    def test_both_rigs(self, make_batches, views_of):
        _, views = views_of(make_batches())
        cameras = [camera for subject in ("S1", "S5", "S6", "S7", "S8") for camera in H36M_CAMERAS[subject]]
        published = {tuple(np.float32(camera.focal).tolist()) for camera in cameras}
        is_published = [tuple(row) in published for row in views.focal.tolist()]
        assert is_published == [True] * 32 + [False] * 32
        assert not views.radial[32:].any() and views.radial[:32].all()
        assert len(set(map(tuple, views.image_size.tolist()))) > 3

    @pytest.mark.parametrize("wide", [True, False])
    def test_training_has_no_camera_of_the_evaluation(self, make_batches, monkeypatch, wide):
        used = []

        def record(name):
            original = getattr(batches, name)
            return lambda *arguments: used.append(arguments[1]) or original(*arguments)

        monkeypatch.setattr(batches, "h36m_views", record("h36m_views"))
        monkeypatch.setattr(batches, "wild_views", record("wild_views"))
        make_batches(vary_cameras=wide).batch(0)
        assert used[0] == ("S1", "S5", "S6", "S7", "S8")
        assert {ranges.focal for ranges in used[1:]} == {(0.6, 2.0) if wide else (0.8, 1.6)}

    def test_missing_joints(self, make_batches, views_of):
        batch, _ = views_of(make_batches(batch_size=512))
        presence = batch.condition[..., 2]
        assert set(presence.unique().tolist()) == {0.0, 1.0}
        assert 0.02 < float((presence == 0).float().mean()) < 0.2
        assert not batch.condition[presence == 0].any()
        assert float((presence == 0).float().mean(dim=1).max()) <= 0.6
        # Whole limbs go missing.
        assert bool(((presence[:, 11:14] == 0).all(dim=1) & (presence[:, 14:17] == 1).all(dim=1)).any())

    def test_noise(self, make_batches, views_of):
        batch, views = views_of(make_batches(batch_size=512))
        pixels = views.keypoints_2d
        side = (pixels.amax(dim=1) - pixels.amin(dim=1)).amax(dim=1)
        present = batch.condition[..., 2] > 0
        low = torch.where(present.unsqueeze(-1), batch.condition[..., :2], torch.inf).amin(dim=1)
        high = torch.where(present.unsqueeze(-1), batch.condition[..., :2], -torch.inf).amax(dim=1)
        torch.testing.assert_close((low + high)[side > 0], torch.zeros(512, 2), atol=1e-4, rtol=0.0)
        clean, clean_views = views_of(make_batches(batch_size=512, noise_scale=0.0))
        assert bool((clean.condition[..., 2] == 1).all())
        assert torch.equal(clean_views.keypoints_2d, pixels)
        # People that the detector sees perfectly are among the noisy ones, most are not.
        shift = (batch.condition - clean.condition)[..., :2].abs().flatten(1).amax(dim=1)
        assert 0.05 < float((shift < 1e-4).float().mean()) < 0.25

    def test_no_noise_has_none_missing(self, make_batches):
        for step in range(5):
            batch = make_batches(noise_scale=0.0, batch_size=128).batch(step)
            assert bool((batch.condition[..., 2] == 1).all())

    def test_noise_and_missing_joints_apart(self, make_batches):
        both, noisy, missing, clean = (
            make_batches(batch_size=256, **settings).batch(0).condition
            for settings in ({}, {"missing_scale": 0.0}, {"noise_scale": 0.0, "missing_scale": 2.0}, {"noise_scale": 0})
        )
        assert bool((noisy[..., 2] == 1).all())
        # Noise moves some joints across the image's border.
        assert float((missing[..., 2] == both[..., 2]).float().mean()) > 0.99
        # The box of the others is that of fewer joints.
        whole = ((both[..., 2] == 1) & (missing[..., 2] == 1)).all(dim=1)
        assert 0.2 < float(whole.float().mean()) < 0.9
        assert torch.equal(noisy[whole], both[whole])
        assert torch.equal(missing[whole], clean[whole]) and not torch.equal(noisy[whole], clean[whole])

    def test_missing_joints_are_filled_without_a_presence_channel(self, make_batches, monkeypatch):
        missing = []

        def record(keypoints_2d, present, *args, **kwargs):
            missing.append(~present)
            return original(keypoints_2d, present, *args, **kwargs)

        original = batches.make_conditioning
        monkeypatch.setattr(batches, "make_conditioning", record)
        for step in range(5):
            batch = make_batches(PAPER, batch_size=256).batch(step)
            assert torch.isfinite(batch.condition).all()
            assert missing[-1].any() and batch.condition[missing[-1]].abs().sum(dim=1).min() > 0

    def test_augmentation_can_be_switched_off(self, make_batches, mocap, views_of):
        source = make_batches(mirror=False, vary_bodies=False)
        _, views = views_of(source)
        positions = torch.from_numpy(mocap.positions)[source.shuffle.indices(0, 64)]
        assert bool(is_same_shape(views.poses_3d, positions).all())

    def test_mirrored_samples(self, make_batches, mocap, views_of):
        source = make_batches(vary_bodies=False)
        _, views = views_of(source)
        positions = torch.from_numpy(mocap.positions)[source.shuffle.indices(0, 64)]
        plain = is_same_shape(views.poses_3d, positions)
        mirrored = is_same_shape(views.poses_3d, positions[:, list(H36M_17.flip_permutation)] * MIRROR)
        assert bool((plain ^ mirrored).all())
        assert 0.25 < float(mirrored.float().mean()) < 0.75

    def test_balanced_subjects(self, make_batches, mocap):
        source = make_batches(balance_subjects=True)
        index = torch.cat([source.shuffle.indices(step, 64) for step in range(400)])
        names, counts = np.unique(mocap.subject[index.numpy()], return_counts=True)
        share = dict(zip(names.tolist(), counts / counts.sum(), strict=True))
        total = np.sqrt(120) + np.sqrt(60) + np.sqrt(40)
        for name, count in (("walker_01", 120), ("walker_02", 60), ("uiprmd_s10", 40)):
            assert share[name] == pytest.approx(np.sqrt(count) / total, abs=0.02)

    def test_statistics(self, make_batches):
        source = make_batches(batch_size=1_000)
        mean, scale = pose_statistics(source)
        poses = np.concatenate([source.batch(step).poses_3d.double().numpy() for step in range(50)])
        np.testing.assert_allclose(mean.numpy(), poses.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(scale.numpy()[1:], np.maximum(poses.std(axis=0), 0.05)[1:], rtol=1e-3)
        assert scale[0].tolist() == pytest.approx([0.05] * 3)

    def test_statistics_take_as_long_whatever_the_batch_size(self, make_batches, monkeypatch):
        """A run of two samples a step stalled for minutes before its first one."""
        expected, source, drawn = pose_statistics(make_batches(batch_size=256)), make_batches(batch_size=2), []
        original = MocapBatches.draw
        monkeypatch.setattr(
            MocapBatches,
            "draw",
            lambda self, index, generator: drawn.append(len(index)) or original(self, index, generator),
        )
        for one, other in zip(pose_statistics(source), expected, strict=True):
            assert torch.equal(one, other)
        assert len(drawn) <= 100 and sum(drawn) == 50_000

    def test_other_joint_counts(self, make_batches):
        model = replace(PARALLEL, denoiser=replace(PARALLEL.denoiser, skeleton="humaneva_15"))
        with pytest.raises(ValueError, match="must have 16 or 17, got 15"):
            make_batches(model).batch(0)


def is_same_shape(one, other):
    """Return which poses are the same up to a turn: equal distances between joints, and not inside out."""
    near = (torch.cdist(one, one) - torch.cdist(other, other)).abs().amax(dim=(1, 2)) < 1e-3
    chirality = [
        torch.linalg.det(
            torch.stack((pose[:, 1] - pose[:, 4], pose[:, 7] - pose[:, 0], pose[:, 5] - pose[:, 4]), dim=1)
        )
        for pose in (one, other)
    ]  # right, up and left thigh: six volumes of a tetrahedron
    return near & ((chirality[0] - chirality[1]).abs() < 1e-4) & (chirality[0].abs() > 0)


class TestBodies:
    def test_bones(self, mocap):
        positions = torch.from_numpy(mocap.positions)
        varied = vary_bodies(positions, torch.Generator().manual_seed(0), mirror=False)
        ratio = bone_lengths(varied) / bone_lengths(positions)
        pairs = [(0, 3), (1, 4), (2, 5), (10, 13), (11, 14), (12, 15)]
        for left, right in pairs:  # both sides alike
            torch.testing.assert_close(ratio[:, left], ratio[:, right], atol=1e-3, rtol=1e-3)
        assert 0.05 < float(ratio.log().std()) < 0.13
        # Directions stay.
        for parent, child in H36M_17.edges:
            cosine = torch.cosine_similarity(
                varied[:, child] - varied[:, parent], positions[:, child] - positions[:, parent], dim=1
            )
            assert float(cosine.min()) > 1 - 1e-5

    def test_heading(self, mocap):
        positions = torch.from_numpy(mocap.positions)
        turned = turn_heading(positions, torch.Generator().manual_seed(0))
        torch.testing.assert_close(torch.cdist(turned, turned), torch.cdist(positions, positions), atol=1e-4, rtol=1e-4)
        assert float(turned[:, 0, :2].abs().max()) < 1e-6
        assert float(turned[..., 2].amin(dim=1).abs().max()) < 1e-6
        facing = torch.atan2(*(turned[:, 4] - turned[:, 1])[:, :2].unbind(1))
        assert torch.histc(facing, 8, -np.pi, np.pi).min() > 10


def bone_lengths(poses):
    return torch.stack([(poses[:, child] - poses[:, parent]).norm(dim=1) for parent, child in H36M_17.edges], dim=1)


NUM_FRAMES = {"Directions": 4, "Walking": 6}
KEPT = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)


@pytest.fixture
def h36m_path(tmp_path):
    """Human3.6M's 3D file with made-up people."""
    from support.training_runs import stick_figures

    generator = np.random.default_rng(0)
    poses = {}
    for subject in ("S1", "S5", "S9"):
        poses[subject] = {}
        for action, count in NUM_FRAMES.items():
            poses[subject][action] = np.zeros((count, 32, 3), dtype=np.float32)
            figures = stick_figures(count, generator)
            figures[..., :2] -= figures[:, :1, :2]
            poses[subject][action][:, KEPT] = figures
    np.savez_compressed(tmp_path / "data_3d_h36m.npz", positions_3d=poses)
    return tmp_path / "data_3d_h36m.npz"


@pytest.fixture
def make_h36m(h36m_path):
    """Return batches of training subjects; ``change`` may edit the sequences first."""

    def make(model=PAPER, change=None, **settings):
        skeleton = H36M_17 if model.denoiser.skeleton == "h36m_17" else H36M_16
        sequences = load_h36m(h36m_path, subjects=("S1", "S5"), skeleton=skeleton)
        if change is not None:
            sequences = [change(index, sequence) for index, sequence in enumerate(sequences)]
        return H36MBatches(sequences, model, TrainConfig(**{"batch_size": 16, **settings}), CPU)

    return make


def with_keypoints(sequence: H36MSequence, keypoints: np.ndarray) -> H36MSequence:
    return replace(sequence, keypoints_2d=keypoints.astype(np.float32))


class TestH36M:
    @pytest.mark.parametrize("num_joints", [17, 16])
    @pytest.mark.parametrize("model", [PAPER, PARALLEL], ids=["paper", "parallel"])
    def test_an_epoch_holds_every_frame_and_its_mirror_image(self, make_h36m, model, num_joints):
        source = make_h36m(with_joints(model, num_joints), batch_size=20)
        assert source.num_samples == 2 * 2 * 4 * 10
        inputs = torch.cat([source.batch(step).condition for step in range(8)])
        poses = torch.cat([source.batch(step).poses_3d for step in range(8)])
        assert inputs.shape == (160, num_joints, model.denoiser.condition_channels)
        index = torch.cat([source.shuffle.indices(step, 20) for step in range(8)])
        order = list((H36M_17 if num_joints == 17 else H36M_16).flip_permutation)
        by_index = index.argsort()
        plain, mirrored = by_index[:80], by_index[80:]
        assert not torch.equal(inputs[plain], inputs[mirrored])
        sign = torch.ones(inputs.shape[-1])
        sign[0] = -1.0
        torch.testing.assert_close(inputs[mirrored], inputs[plain][:, order] * sign, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(poses[mirrored], poses[plain][:, order] * MIRROR, atol=1e-5, rtol=0.0)

    def test_plain_samples(self, make_h36m, h36m_path):
        source = make_h36m(mirror=False, batch_size=80)
        batch, index = source.batch(0), source.shuffle.indices(0, 80)
        frames = [
            (2.0 * pixels / size[0] - np.array([1.0, size[1] / size[0]]), pose)
            for sequence in load_h36m(h36m_path, subjects=("S1", "S5"))
            for size in [sequence.camera.size]
            for pixels, pose in zip(sequence.keypoints_2d, sequence.poses_3d, strict=True)
        ]
        assert sorted(index.tolist()) == list(range(len(frames))) == list(range(80))
        for row, frame in enumerate(index.tolist()):
            np.testing.assert_allclose(batch.condition[row].numpy(), frames[frame][0], atol=1e-5)
            np.testing.assert_array_equal(batch.poses_3d[row].numpy(), frames[frame][1])

    def test_turned_target(self, make_h36m):
        paper, person = make_h36m().batch(0), make_h36m(PARALLEL).batch(0)
        torch.testing.assert_close(person.poses_3d.norm(dim=-1), paper.poses_3d.norm(dim=-1), atol=1e-5, rtol=0.0)
        assert float((person.poses_3d - paper.poses_3d).abs().amax(dim=(1, 2)).max()) > 1e-3

    @pytest.mark.parametrize("how", ["nan", "confidence"])
    def test_missing_keypoints(self, make_h36m, how):
        def change(index, sequence):
            confidence = np.ones((*sequence.keypoints_2d.shape[:2], 1))
            keypoints = np.concatenate((sequence.keypoints_2d, confidence), axis=-1)
            keypoints[:, 3] = (np.nan, np.nan, 1.0) if how == "nan" else (5.0, 5.0, 0.0)
            return with_keypoints(sequence, keypoints)

        source = make_h36m(PARALLEL, change)
        batch, index = source.batch(0), source.shuffle.indices(0, 16)
        missing = torch.zeros(16, 17, dtype=torch.bool)
        missing[index < 80, 3] = True
        missing[index >= 80, 6] = True  # in the mirror the right foot is the left one
        assert torch.equal(batch.condition[..., 2] == 0, missing)
        assert not batch.condition[missing].any()
        assert torch.isfinite(batch.condition).all() and torch.isfinite(batch.poses_3d).all()
        filled = make_h36m(PAPER, change).batch(0)
        assert torch.isfinite(filled.condition).all() and bool((filled.condition[missing].abs().sum(dim=1) > 0).all())

    @pytest.mark.parametrize("model", [PAPER, PARALLEL], ids=["paper", "parallel"])
    def test_frames_with_more_than_half_missing_are_left_out(self, make_h36m, model):
        def change(index, sequence):
            keypoints = sequence.keypoints_2d.copy()
            keypoints[0] = np.nan
            keypoints[1, :9] = np.nan
            keypoints[2, :8] = np.nan  # still usable
            return with_keypoints(sequence, keypoints)

        with pytest.warns(UserWarning, match="32 of 80 frames are left out"):
            source = make_h36m(model, change, batch_size=32)
        assert source.num_samples == 2 * (80 - 2 * 16)
        for step in range(4):
            batch = source.batch(step)
            assert torch.isfinite(batch.condition).all() and torch.isfinite(batch.poses_3d).all()

    def test_nothing_left(self, make_h36m):
        with pytest.raises(InputError, match="no frame"):
            make_h36m(change=lambda _, sequence: with_keypoints(sequence, np.nan * sequence.keypoints_2d))

    def test_depends_on_seed_and_step(self, make_h36m):
        first = make_h36m().batch(3)
        assert torch.equal(make_h36m().batch(3).condition, first.condition)
        assert not torch.equal(make_h36m().batch(4).condition, first.condition)
        assert not torch.equal(make_h36m(seed=1).batch(3).condition, first.condition)

    def test_balanced_subjects(self, make_h36m):
        def change(index, sequence):
            if sequence.subject == "S1":
                return sequence
            return replace(
                sequence,
                keypoints_2d=sequence.keypoints_2d[:1], poses_3d=sequence.poses_3d[:1], root=sequence.root[:1],
            )  # fmt: skip

        source = make_h36m(change=change, balance_subjects=True)  # S1 has 40 frames, S5 has 8
        frame = torch.cat([source.shuffle.order(epoch) for epoch in range(200)]) % 48
        share = float((frame < 40).double().mean())
        assert share == pytest.approx(np.sqrt(40) / (np.sqrt(40) + np.sqrt(8)), abs=0.02)
