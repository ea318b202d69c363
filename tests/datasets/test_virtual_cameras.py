"""Virtual cameras and detector noise: geometry exactly, distributions against the documented numbers."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import resources

import numpy as np
import pytest
import torch

from diffupose.camera import project
from diffupose.datasets import cameras_h36m
from diffupose.datasets.cameras_h36m import H36M_CAMERAS
from diffupose.datasets.mocap import load_mocap
from diffupose.datasets.virtual_cameras import (
    EVALUATION_RANGES,
    EVALUATION_SUBJECTS,
    TRAINING_RANGES,
    TRAINING_SUBJECTS,
    WILD_IMAGE_SIZES,
    Views,
    choose_views,
    detect,
    h36m_views,
    turn_heading,
    vary_bodies,
    wild_views,
)
from diffupose.skeleton import H36M_17

# The table of the detector's noise, by name, in longer sides of the person's box.
DEVIATIONS = {
    0.008: ("Hip", "RHip", "LHip", "Spine", "Thorax", "LShoulder", "RShoulder"),
    0.012: ("RKnee", "LKnee", "LElbow", "RElbow", "Neck/Nose", "Head"),
    0.02: ("RFoot", "LFoot", "LWrist", "RWrist"),
}
LIMBS = [{1, 2, 3}, {4, 5, 6}, {11, 12, 13}, {14, 15, 16}]
MANY = 6000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def people():
    """Real poses ``[MANY, 17, 3]``: the sample repeated."""
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        positions = torch.from_numpy(load_mocap(path).positions)
    return positions.repeat(-(-MANY // len(positions)), 1, 1)[:MANY]


@pytest.fixture(scope="module")
def turned(people):
    return turn_heading(people, seeded())


@pytest.fixture(scope="module")
def wild(turned):
    return wild_views(turned, EVALUATION_RANGES, seeded(1))


def bone_lengths(positions):
    parents = list(H36M_17.parents)
    return (positions[:, 1:] - positions[:, parents[1:]]).norm(dim=-1)


def rigid(world, camera):
    """Return rotations ``[B, 3, 3]`` and camera positions ``[B, 3]`` with ``camera = R (world - position)``."""
    world_center, camera_center = world.mean(dim=1, keepdim=True), camera.mean(dim=1, keepdim=True)
    u, _, vh = torch.linalg.svd((camera - camera_center).mT @ (world - world_center))
    sign = torch.ones(len(world), 3, dtype=world.dtype)
    sign[:, 2] = torch.linalg.det(u @ vh)
    rotation = u * sign[:, None] @ vh
    eye = world_center - camera_center @ rotation
    residual = ((world - eye) @ rotation.mT - camera).abs().max()
    assert residual < 1e-4
    return rotation, eye.squeeze(1)


def assert_uniform(values, low, high):
    """The range is respected and reached, and the quartiles are where they belong."""
    span = high - low
    assert values.min() >= low - 1e-3 * span and values.max() <= high + 1e-3 * span
    expected = torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98], dtype=values.dtype)
    quantiles = (torch.quantile(values, expected) - low) / span
    torch.testing.assert_close(quantiles, expected, atol=0.03, rtol=0)


def same(first, second):
    return all(torch.equal(getattr(first, item.name), getattr(second, item.name)) for item in fields(Views))


class TestTurnHeading:
    def test_keeps_the_body(self, people, turned):
        torch.testing.assert_close(bone_lengths(turned), bone_lengths(people), atol=2e-6, rtol=0)
        # Not mirrored: the hips' axis, the spine and the forward direction keep their handedness.
        for positions in (people, turned):
            across, up, head = (positions[:, j] - positions[:, 0] for j in (4, 8, 10))
            triple = (torch.linalg.cross(across, up) * head).sum(dim=-1)
            if positions is people:
                before = triple
        torch.testing.assert_close(triple, before, atol=1e-5, rtol=0)

    def test_stands_on_the_floor_at_the_origin(self, people, turned):
        assert (turned[:, 0, :2] == 0).all()
        assert (turned[..., 2].amin(dim=1) == 0).all()
        heights = people[..., 2] - people[:, :1, 2]
        torch.testing.assert_close(turned[..., 2] - turned[:, :1, 2], heights, atol=1e-6, rtol=0)

    def test_heading_is_uniform(self, people, turned):
        axis, before = turned[:, 4] - turned[:, 1], people[:, 4] - people[:, 1]
        angle = torch.atan2(axis[:, 1], axis[:, 0]) - torch.atan2(before[:, 1], before[:, 0])
        assert_uniform((angle / (2 * torch.pi)) % 1.0, 0.0, 1.0)


@pytest.mark.parametrize("rig", ["h36m", "wild"])
class TestDraws:
    def draw(self, rig, positions, generator):
        if rig == "h36m":
            return h36m_views(positions, EVALUATION_SUBJECTS, generator)
        return wild_views(positions, EVALUATION_RANGES, generator)

    def test_determined_by_the_generator(self, turned, rig):
        first, again = (self.draw(rig, turned[:50], seeded(3)) for _ in range(2))
        assert same(first, again)
        assert not same(first, self.draw(rig, turned[:50], seeded(4)))

    def test_do_not_depend_on_other_people(self, turned, rig):
        """A process that works on a slice draws the whole: who else is there changes nothing."""
        others = turned[:60].clone()
        others[20:] = turned[100:140]
        scale = torch.ones(60)
        whole, mixed = (
            detect(self.draw(rig, positions, seeded(3)), scale, seeded(5)) for positions in (turned[:60], others)
        )
        assert same(whole[:20], mixed[:20])
        assert not same(whole, mixed)

    def test_consistent(self, turned, rig):
        """Pixels, poses, roots and lenses describe one scene."""
        views = self.draw(rig, turned[:500], seeded(3))
        assert (views.poses_3d[:, 0] == 0).all()
        assert views.present.all()
        points = (views.poses_3d + views.root[:, None]).double()
        lens = (getattr(views, name).double() for name in ("focal", "center", "radial", "tangential"))
        torch.testing.assert_close(views.keypoints_2d.double(), project(points, *lens), atol=2e-2, rtol=0)
        # The person is the one that was given.
        rigid(turned[:500], points.float())
        torch.testing.assert_close(bone_lengths(views.poses_3d), bone_lengths(turned[:500]), atol=1e-5, rtol=0)


class TestH36MRig:
    @pytest.mark.parametrize("subjects", [EVALUATION_SUBJECTS, TRAINING_SUBJECTS])
    def test_published_cameras(self, turned, subjects):
        """Each view is exactly what one published camera of these subjects sees, and each camera is used."""
        positions = turned[:1000]
        views = h36m_views(positions, subjects, seeded(1))
        rotation, eye = rigid(positions, views.poses_3d + views.root[:, None])
        cameras = [camera for subject in subjects for camera in H36M_CAMERAS[subject]]
        # Several subjects' cameras share lenses and differ in their place.
        lenses = torch.tensor([camera.focal + camera.center + camera.radial + camera.tangential for camera in cameras])
        own = torch.cat((views.focal, views.center, views.radial, views.tangential), dim=1)
        height = torch.tensor([camera.translation[2] for camera in cameras])
        same_lens = ((own[:, None] - lenses).abs() < 1e-4).all(dim=-1)
        same_height = (eye[:, None, 2] - height).abs() < 1e-4
        matches = same_lens & same_height
        assert (matches.sum(dim=1) == 1).all()
        counts = matches.sum(dim=0)
        assert (counts > 0.6 * 1000 / len(cameras)).all()
        offsets = []
        for row in range(0, 1000, 10):
            camera = cameras[int(matches[row].nonzero())]
            assert views.image_size[row].tolist() == list(camera.size)
            w, x, y, z = camera.orientation
            look = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])  # R of +z
            np.testing.assert_allclose(rotation[row, 2], look, atol=1e-4)
            # Where the person stands: what the camera's place in the person's frame says.
            offset = np.array(camera.translation) - eye[row].numpy()
            offsets.append(offset)
            points = cameras_h36m.world_to_camera(positions[row].numpy() + offset, camera)
            expected = cameras_h36m.project(points, camera)
            inside = ((expected > 0) & (expected < 1000)).all(axis=1)
            np.testing.assert_allclose(views.keypoints_2d[row][inside], expected[inside], atol=0.3)
        offsets = np.array(offsets)
        assert np.abs(offsets[:, 2]).max() < 1e-3  # on the floor
        assert np.linalg.norm(offsets[:, :2], axis=1).max() <= 1.0

    def test_place_is_uniform_over_the_disc(self, turned):
        views = h36m_views(turned, EVALUATION_SUBJECTS, seeded(2))
        _, eye = rigid(turned, views.poses_3d + views.root[:, None])
        cameras = torch.tensor([camera.translation for camera in H36M_CAMERAS["S9"]])
        nearest = (views.focal[:, None, 0] - torch.tensor([c.focal[0] for c in H36M_CAMERAS["S9"]])).abs().argmin(dim=1)
        place = (cameras[nearest] - eye)[:, :2]
        assert_uniform(place.square().sum(dim=1), 0.0, 1.0)
        assert_uniform(torch.atan2(place[:, 1], place[:, 0]), -torch.pi, torch.pi)

    def test_people_are_in_front_and_mostly_seen(self, turned):
        views = h36m_views(turned, EVALUATION_SUBJECTS, seeded(2))
        assert (views.poses_3d[..., 2] + views.root[:, None, 2]).min() > 1.0
        assert views.usable.float().mean() > 0.99
        assert views.outside.float().mean() < 0.05


class TestWildRig:
    @pytest.mark.parametrize("name", ["evaluation", "training"])
    def test_ranges(self, turned, name):
        ranges = {"evaluation": EVALUATION_RANGES, "training": TRAINING_RANGES}[name]
        focal, pitch, roll, distance, aim_sd = {
            "evaluation": ((0.8, 1.6), (-10, 35), 4.0, (2.5, 6.0), 0.15),
            "training": ((0.6, 2.0), (-15, 40), 8.0, (1.5, 10.0), 0.2),
        }[name]
        views = wild_views(turned, ranges, seeded(1))
        assert_uniform(views.focal[:, 0] / views.image_size.amax(dim=1), *focal)
        assert torch.equal(views.focal[:, 0], views.focal[:, 1])
        assert torch.equal(views.center, views.image_size / 2)
        assert (views.radial == 0).all() and (views.tangential == 0).all()
        rotation, eye = rigid(turned.double(), (views.poses_3d + views.root[:, None]).double())
        right, down, forward = rotation.unbind(dim=1)
        assert_uniform(torch.asin(-forward[:, 2]).rad2deg(), *pitch)
        assert down[:, 2].max() < 0  # nobody is upside down
        horizontal = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]).double().expand(MANY, 3))
        horizontal = horizontal / horizontal.norm(dim=-1, keepdim=True)
        angle = torch.atan2((right * torch.linalg.cross(forward, horizontal)).sum(-1), (right * horizontal).sum(-1))
        angle = angle.rad2deg()
        assert abs(angle.std() - roll) < 0.05 * roll and abs(angle.mean()) < 0.1 * roll
        # Across the line of sight the aim's deviation is seen as it is; along it, it adds to the distance.
        pelvis = (rotation @ (turned[:, 0].double() - eye).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(pelvis.float(), views.root, atol=1e-4, rtol=0)
        for axis in (0, 1):
            assert abs(pelvis[:, axis].std() - aim_sd) < 0.05 * aim_sd and abs(pelvis[:, axis].mean()) < 0.1 * aim_sd
        span = distance[1] - distance[0]
        variance = span**2 / 12 + aim_sd**2
        assert abs(pelvis[:, 2].mean() - sum(distance) / 2) < 0.02 * span
        assert abs(pelvis[:, 2].var() - variance) < 0.06 * variance

    def test_image_sizes_are_all_used(self, wild):
        sizes, counts = wild.image_size.unique(dim=0, return_counts=True)
        assert {tuple(size) for size in sizes.int().tolist()} == set(WILD_IMAGE_SIZES)
        assert set(WILD_IMAGE_SIZES) == {(1280, 720), (1920, 1080), (1080, 1920), (1000, 1000)}
        assert counts.min() > 0.22 * MANY


@pytest.fixture(scope="module")
def inside():
    """Clean views with everybody well inside a large image, all boxes different."""
    corner = torch.rand(MANY, 1, 2, generator=seeded(8)) * 1000 + 1500
    side = torch.rand(MANY, 1, 1, generator=seeded(9)) * 900 + 100
    points = torch.rand(MANY, 17, 2, generator=seeded(10)) * torch.tensor([0.5, 1.0])
    some = torch.zeros(MANY, 2)
    return Views(
        torch.zeros(MANY, 17, 3),
        torch.zeros(MANY, 3),
        corner + side * points,
        torch.ones(MANY, 17, dtype=torch.bool),
        some + 5000,
        some,
        some,
        torch.zeros(MANY, 3),
        some,
    )


@pytest.fixture(scope="module")
def moved(inside):
    """Displacements in longer sides of the clean box, ``[MANY, 17, 2]``."""
    noisy = detect(inside, torch.ones(MANY), seeded(2))
    box = inside.keypoints_2d.amax(dim=1) - inside.keypoints_2d.amin(dim=1)
    return (noisy.keypoints_2d - inside.keypoints_2d) / box.amax(dim=1)[:, None, None]


class TestDetect:
    def test_deviation_of_each_joint(self, moved):
        """By the median, which the outliers hardly move: of |N(0, 1)| it is 0.6745."""
        median = moved.abs().permute(1, 0, 2).flatten(1).median(dim=1).values / 0.6745
        names = {name: deviation for deviation, group in DEVIATIONS.items() for name in group}
        expected = torch.tensor([names[name] for name in H36M_17.joint_names])
        torch.testing.assert_close(median, expected * 1.03, rtol=0.05, atol=0)

    def test_no_bias(self, moved):
        assert moved.mean(dim=0).abs().max() < 0.002
        assert abs(np.corrcoef(moved[..., 0].ravel(), moved[..., 1].ravel())[0, 1]) < 0.02

    def test_outliers(self, moved):
        """Beyond 5 deviations of the noisiest joint there are outliers only; 61 % of them are that far out."""
        share = (moved.norm(dim=-1) > 0.1).float().mean()
        assert abs(share / np.exp(-0.5) - 0.03) < 0.002
        far = moved[moved.norm(dim=-1) > 0.1]
        # Of a Rayleigh distribution beyond its deviation: E[r^2] = 3 deviations squared.
        assert abs(far.square().sum(dim=1).mean() / 0.03 - 1) < 0.08

    def test_missing_joints_and_limbs(self, inside):
        present = detect(inside, torch.ones(MANY), seeded(2)).present
        limbs = torch.stack([~present[:, sorted(limb)].any(dim=1) for limb in LIMBS], dim=1)
        assert abs(limbs.any(dim=1).float().mean() - 0.05) < 0.009
        assert (limbs.sum(dim=1) <= 1).float().mean() > 0.999
        shares = limbs.float().sum(dim=0) / limbs.sum()
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.08, rtol=0)
        rest = present[~limbs.any(dim=1)]
        assert abs((~rest).float().mean() - 0.03) < 0.002
        # The torso is in no limb.
        torso = [j for j in range(17) if not any(j in limb for limb in LIMBS)]
        assert abs((~present[:, torso]).float().mean() - 0.03) < 0.004

    def test_scale_multiplies_the_deviations(self, inside):
        half, one = (detect(inside, torch.full((MANY,), scale), seeded(2)) for scale in (0.5, 1.0))
        first, second = (views.keypoints_2d - inside.keypoints_2d for views in (half, one))
        ratio = (first.norm(dim=-1) / second.norm(dim=-1)).median()
        assert abs(ratio - 0.5) < 1e-3
        assert abs((~half.present).float().mean() / (~one.present).float().mean() - 0.5) < 0.06

    def test_missing_joints_have_a_level_of_their_own(self, inside):
        one, none = torch.ones(MANY), torch.zeros(MANY)
        both = detect(inside, one, seeded(2))
        moved = detect(inside, one, seeded(2), missing_scale=none)
        assert moved.present.all() and torch.equal(moved.keypoints_2d, both.keypoints_2d)
        dropped = detect(inside, none, seeded(2), missing_scale=one)
        assert torch.equal(dropped.present, both.present)
        assert torch.equal(dropped.keypoints_2d, inside.keypoints_2d)

    def test_scale_zero_changes_nothing(self, inside):
        scale = torch.ones(MANY)
        scale[::2] = 0.0
        noisy = detect(inside, scale, seeded(2))
        assert same(noisy[::2], inside[::2])
        assert not torch.equal(noisy.keypoints_2d[1::2], inside.keypoints_2d[1::2])

    def test_the_truth_is_not_touched(self, wild):
        noisy = detect(wild, torch.ones(MANY), seeded(2))
        for name in ("poses_3d", "root", "image_size", "focal", "center", "radial", "tangential"):
            assert torch.equal(getattr(noisy, name), getattr(wild, name))

    def outside_views(self, inside, num_outside, rows=400):
        """Return views in which the last joints of everybody are left of the image."""
        keypoints = inside.keypoints_2d[:rows].clone()
        keypoints[:, 17 - num_outside :, 0] -= 1e4
        return replace(inside[:rows], keypoints_2d=keypoints)

    def test_joints_outside_are_missing(self, inside):
        views = self.outside_views(inside, 4)
        assert views.outside[:, 13:].all() and not views.outside[:, :13].any()
        noisy = detect(views, torch.zeros(400), seeded(2))
        assert views.present.all()  # clean views keep them
        assert not noisy.present[:, 13:].any() and noisy.present[:, :13].all()

    def test_joints_outside_stay_where_asked(self, inside):
        drop = torch.arange(400) % 2 == 0
        noisy = detect(self.outside_views(inside, 4), torch.zeros(400), seeded(2), drop_outside=drop)
        assert not noisy.present[drop, 13:].any() and noisy.present[~drop].all()

    @pytest.mark.parametrize("num_outside", [8, 9])
    def test_never_more_than_half_missing_by_being_outside(self, inside, num_outside):
        views = self.outside_views(inside, num_outside)
        silent = detect(views, torch.zeros(400), seeded(2))
        assert (silent.present.sum(dim=1) == (9 if num_outside == 8 else 17)).all()
        noisy = detect(views, torch.ones(400), seeded(2))
        assert noisy.present.sum(dim=1).min() >= 9

    def test_real_views_stay_usable(self, wild):
        noisy = detect(wild[wild.usable], torch.ones(int(wild.usable.sum())), seeded(2))
        assert noisy.present.sum(dim=1).min() >= 9
        assert (noisy.outside & noisy.present).any(dim=1).float().mean() < 0.02

    def test_missing_joints_stay_missing(self, inside):
        present = torch.rand(MANY, 17, generator=seeded(4)) > 0.2
        noisy = detect(replace(inside, present=present), torch.ones(MANY), seeded(2))
        assert not (noisy.present & ~present).any()


class TestUsable:
    def test_outside(self, inside):
        keypoints = torch.full((4, 17, 2), 50.0)
        keypoints[1, 0, 0], keypoints[2, 3, 1], keypoints[3, 5] = -0.1, 100.0, torch.tensor([0.0, 99.9])
        views = replace(inside[:4], keypoints_2d=keypoints, image_size=torch.tensor([[200.0, 100.0]]).repeat(4, 1))
        assert views.outside.nonzero().tolist() == [[1, 0], [2, 3]]

    def test_usable(self, inside):
        keypoints, poses = torch.full((5, 17, 2), 50.0), torch.zeros(5, 17, 3)
        root = torch.tensor([0.0, 0.0, 3.0]).repeat(5, 1)
        keypoints[1, :8, 0] = -1.0  # 8 of 17
        keypoints[2, :9, 0] = -1.0
        poses[3, 7, 2] = -2.75  # a spine 0.25 m before the camera
        root[4, 2] = -3.0
        size = torch.full((5, 2), 100.0)
        views = replace(inside[:5], keypoints_2d=keypoints, poses_3d=poses, root=root, image_size=size)
        assert views.usable.tolist() == [True, True, False, False, False]

    def test_people_behind_the_camera_are_finite_and_unusable(self, turned):
        near = replace(EVALUATION_RANGES, distance=(0.0, 0.5))
        views = wild_views(turned[:500], near, seeded(1))
        behind = (views.poses_3d[..., 2] + views.root[:, None, 2]).amin(dim=1) <= 0
        assert behind.sum() > 100
        assert views.keypoints_2d.isfinite().all()
        assert not views.usable[behind].any()


class TestChooseViews:
    def test_first_usable(self, inside):
        # Usable by depth alone; the image's width tells the candidates apart.
        depth = torch.tensor([[3.0, 3.0, -1.0, -1.0], [3.0, -1.0, 3.0, -1.0], [3.0, 3.0, 3.0, -1.0]])
        candidates = []
        for number in range(3):
            root = torch.zeros(4, 3)
            root[:, 2] = depth[number]
            size = torch.full((4, 2), 5000.0 + number)
            candidates.append(replace(inside[:4], root=root, image_size=size))
        chosen = choose_views(candidates)
        assert chosen.image_size[:, 0].tolist() == [5000, 5000, 5001, 5002]
        assert chosen.root[:, 2].tolist() == [3.0, 3.0, 3.0, -1.0]

    def test_every_field_moves_together(self, turned):
        near = replace(EVALUATION_RANGES, distance=(0.5, 2.0))
        candidates = [wild_views(turned[:200], near, seeded(seed)) for seed in range(3)]
        chosen = choose_views(candidates)
        firsts = [next((i for i in range(3) if candidates[i].usable[row]), 2) for row in range(200)]
        assert {0, 1, 2} == set(firsts)
        for row, first in enumerate(firsts):
            assert same(chosen[row : row + 1], candidates[first][row : row + 1])

    def test_one_candidate(self, wild):
        assert same(choose_views([wild[:10]]), wild[:10])


class TestVaryBodies:
    def test_nothing_without_deviations(self, people):
        varied = vary_bodies(people[:100], seeded(), body_sd=0.0, bone_sd=0.0, mirror=False)
        torch.testing.assert_close(varied, people[:100], atol=1e-5, rtol=0)

    def test_bones_are_symmetric_and_log_normal(self, people):
        varied = vary_bodies(people, seeded(), body_sd=0.03, bone_sd=0.05, mirror=False)
        before = people[:, 1:] - people[:, list(H36M_17.parents)[1:]]
        after = varied[:, 1:] - varied[:, list(H36M_17.parents)[1:]]
        factor = (after * before).sum(-1) / before.square().sum(-1)
        torch.testing.assert_close(after, factor[..., None] * before, atol=1e-4, rtol=0)  # directions stay
        assert torch.equal(varied[:, 0], people[:, 0])
        left, right = ([joint - 1 for joint in side] for side in (H36M_17.joints_left, H36M_17.joints_right))
        torch.testing.assert_close(factor[:, left], factor[:, right], atol=2e-3, rtol=0)
        logs = factor.log()
        torch.testing.assert_close(logs.std(dim=0), torch.full((16,), (0.03**2 + 0.05**2) ** 0.5), rtol=0.05, atol=0)
        assert logs.mean(dim=0).abs().max() < 0.004
        # The body's size is shared by all bones, the rest by none but the other side.
        shared = np.corrcoef(logs.T.numpy())
        spine, thigh = H36M_17.joint_names.index("Spine") - 1, H36M_17.joint_names.index("LKnee") - 1
        assert abs(shared[spine, thigh] - 0.03**2 / (0.03**2 + 0.05**2)) < 0.05

    def test_mirror(self, people):
        """Half of the people are mirrored: left is right, and x runs the other way."""
        varied = vary_bodies(people, seeded(), body_sd=0.0, bone_sd=0.0)
        permutation = list(H36M_17.flip_permutation)
        mirrored = people[:, permutation] * torch.tensor([-1.0, 1.0, 1.0])
        stays, flips = ((varied - other).abs().amax(dim=(1, 2)) < 1e-4 for other in (people, mirrored))
        assert (stays ^ flips).all()
        assert abs(flips.float().mean() - 0.5) < 0.03

    def test_determined_by_the_generator_for_each_person(self, people):
        others = people[:60].clone()
        others[20:] = people[100:140]
        whole, mixed = (vary_bodies(positions, seeded(3)) for positions in (people[:60], others))
        assert torch.equal(whole[:20], mixed[:20])
        assert not torch.equal(whole, vary_bodies(people[:60], seeded(4)))
