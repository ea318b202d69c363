"""The Lifter: forms of the input, the camera, missing joints and joint counts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.lifts import CLOSE, SIZE, difference
from support.tiny_lifters import people, tiny_lifter
from torch import nn

from diffupose.camera import ASSUMED_FOCAL, person_box, project, rotation_to_ray, viewing_ray
from diffupose.conditioning import make_conditioning

# --- forms of the input ----------------------------------------------------------------------------------------------


def test_forms_of_keypoints(person_lifter):
    poses = np.rint(people(2))
    expected = person_lifter(poses, image_size=SIZE).hypotheses
    with_confidence = np.concatenate((poses, np.full((2, 17, 1), 0.7)), axis=-1)
    for form in (
        poses.tolist(),
        poses.astype(np.float32),
        poses.astype(np.int32),
        torch.from_numpy(poses),
        torch.from_numpy(poses).float().requires_grad_(),
        with_confidence,
        with_confidence.tolist(),
        np.asfortranarray(poses),
    ):
        assert difference(person_lifter(form, image_size=SIZE).hypotheses, expected) < CLOSE
    half = torch.from_numpy(poses).bfloat16()
    assert difference(person_lifter(half, image_size=SIZE).hypotheses, expected) < 0.1


@pytest.mark.parametrize("channels", [2, 3])
def test_leading_dimensions_are_flattened(person_lifter, channels):
    poses = np.concatenate((people(6), np.ones((6, 17, 1))), axis=-1)[..., :channels]
    flat = person_lifter(poses, image_size=SIZE)
    nested = person_lifter(poses.reshape(2, 3, 17, channels), image_size=SIZE)
    assert torch.equal(nested.hypotheses, flat.hypotheses)
    single = person_lifter(poses[0], image_size=SIZE)
    assert single.hypotheses.shape == (1, 5, 17, 3)
    assert difference(single.hypotheses, flat.hypotheses[:1]) < CLOSE


def test_an_empty_batch_gives_an_empty_result(lifter, tmp_path):
    result = lifter(np.zeros((0, 17, 2)), image_size=SIZE, intrinsics=[[900, 0, 500], [0, 900, 400], [0, 0, 1]])
    assert result.hypotheses.shape == (0, 10 if lifter.config.sampling.flip else 5, 17, 3)
    assert result.poses_3d.shape == result.medoid.shape == (0, 17, 3)
    assert result.covariance.shape == (0, 17, 3, 3)
    assert result.translation.shape[0] == 0
    result.save(tmp_path / "empty.npz")
    result.save(tmp_path / "empty.json")


def test_one_image_size_or_one_per_row(image_lifter):
    poses, sizes = people(2), [(1000, 800), (1400, 900)]
    both = image_lifter(poses, image_size=sizes).hypotheses
    for row, size in enumerate(sizes):
        one = image_lifter(poses, image_size=size).hypotheses
        assert difference(one[row], both[row]) < CLOSE
        assert difference(one[1 - row], both[1 - row]) > 1e-4
    assert torch.equal(image_lifter(poses, image_size=torch.tensor(sizes)).hypotheses, both)


def test_results_can_be_changed_and_take_part_in_autograd(person_lifter):
    result = person_lifter(people(1), image_size=SIZE)
    scale = torch.ones((), requires_grad=True)
    (result.hypotheses * scale).sum().backward()
    assert scale.grad is not None
    result.hypotheses.mul_(1000.0)


# --- the camera ------------------------------------------------------------------------------------------------------


def test_person_normalisation_ignores_place_and_size(person_lifter, image_lifter):
    near = people(3)
    far = 0.4 * near + [3000.0, -700.0]
    unturned = person_lifter(near, assumed_focal=None).hypotheses
    assert difference(person_lifter(far, assumed_focal=None).hypotheses, unturned) < CLOSE
    # With a focal length the place counts, and for screen coordinates it always does.
    size = (4000, 3000)
    turned = person_lifter(near, image_size=size).hypotheses
    assert difference(turned, unturned) > 1e-3
    assert difference(person_lifter(far + np.array([0, 900]), image_size=size).hypotheses, turned) > 1e-3
    shifted = image_lifter(near + np.array([200, 0]), image_size=size).hypotheses
    assert difference(image_lifter(near, image_size=size).hypotheses, shifted) > 1e-4


def matrix(fx, fy, cx, cy):
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def test_turned_back_from_the_virtual_camera(person_lifter):
    """A prediction along the virtual camera's axis points along the viewing ray of the person afterwards."""
    keypoints = torch.from_numpy(people(2, center=(1700.0, 200.0))).float()
    focal, center = torch.tensor([900.0, 950.0]), torch.tensor([960.0, 540.0])
    unturned = person_lifter(keypoints, assumed_focal=None).hypotheses
    turned = person_lifter(keypoints, intrinsics=matrix(900, 950, 960, 540)).hypotheses
    box_center, _ = person_box(keypoints, torch.ones(2, 17, dtype=torch.bool))
    ray = torch.cat(((box_center - center) / focal, torch.ones(2, 1)), dim=-1)
    ray = ray / ray.norm(dim=-1, keepdim=True)  # [B, 3]
    # Depth in the virtual camera is the distance along the ray in the real one; lengths stay.
    along = torch.einsum("bhjc,bc->bhj", turned, ray)
    assert difference(along, unturned[..., 2]) < CLOSE
    assert difference(turned.norm(dim=-1), unturned.norm(dim=-1)) < CLOSE
    assert difference(turned, unturned) > 0.01
    # The smallest rotation leaves what is perpendicular to the axis and the ray.
    axis = torch.linalg.cross(ray, torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3))
    kept = [torch.einsum("bhjc,bc->bhj", poses, axis) for poses in (turned, unturned)]
    assert difference(*kept) < CLOSE


def test_assumed_focal_is_a_pinhole_at_the_middle_of_the_image(person_lifter):
    poses = people(2, center=(150.0, 600.0))
    assumed = person_lifter(poses, image_size=SIZE)
    given = person_lifter(poses, intrinsics=matrix(1150, 1150, 500, 400))
    assert ASSUMED_FOCAL == 1.15
    assert difference(assumed.hypotheses, given.hypotheses) < CLOSE
    other = person_lifter(poses, image_size=SIZE, assumed_focal=0.6).hypotheses
    assert difference(assumed.hypotheses, other) > 1e-3
    assert (assumed.meta["assumed_focal"], assumed.meta["focal_length_px"]) == (1.15, [1150.0])
    assert (given.meta["assumed_focal"], given.meta["focal_length_px"]) == (None, [1150.0])


class Oracle(nn.Module):
    """Predicts the same x0 for every row: a lifter that knows the pose."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, sample, condition, timesteps):
        return self.x0.expand_as(sample)


def test_exact_pose_reprojects_exactly(person_lifter, monkeypatch):
    """The true pose, predicted in the virtual camera's frame, comes back, and with it the root."""
    pose = torch.cat((torch.randn(17, 2) * 0.3, torch.randn(17, 1) * 0.2), dim=-1)
    pose = pose - pose[:1]
    root = torch.tensor([1.6, -0.8, 4.0])
    focal, center = torch.tensor([1100.0, 1120.0]), torch.tensor([900.0, 500.0])
    keypoints = project(pose + root, focal, center).unsqueeze(0)
    box_center, _ = person_box(keypoints, torch.ones(1, 17, dtype=torch.bool))
    turn = rotation_to_ray(viewing_ray(box_center, focal, center))[0]
    seen = pose @ turn.T
    oracle = Oracle((seen - person_lifter.pose_mean) / person_lifter.pose_scale)
    monkeypatch.setattr(person_lifter, "denoiser", oracle)
    intrinsics = matrix(1100, 1120, 900, 500)
    result = person_lifter(keypoints, intrinsics=intrinsics, num_hypotheses=4)
    assert difference(result.hypotheses, pose.expand(1, 4, 17, 3)) < 1e-5
    assert difference(result.translation, root.expand(1, 4, 3)) < 1e-3
    placed = result.hypotheses + result.translation[:, :, None]
    reprojected = project(placed, focal.expand(1, 1, 2), center.expand(1, 1, 2))
    assert difference(reprojected, keypoints[:, None].expand_as(reprojected)) < 0.05
    assert difference(result.best("reprojection", intrinsics=intrinsics), pose[None]) < 1e-5
    without = person_lifter(keypoints, image_size=(1920, 1080))
    assert without.translation is None


def test_intrinsics_per_row(person_lifter):
    poses = people(2, center=(200.0, 300.0))
    matrices = torch.stack((matrix(900, 900, 500, 400), matrix(1500, 1400, 520, 390)))
    both = person_lifter(poses, intrinsics=matrices)
    for row in range(2):
        one = person_lifter(poses, intrinsics=matrices[row])
        assert difference(one.hypotheses[row], both.hypotheses[row]) < CLOSE
        # The depth of the root is a few metres with a relative precision of float32 keypoints.
        assert torch.allclose(one.translation[row], both.translation[row], rtol=1e-3)


# --- missing joints and joint counts ---------------------------------------------------------------------------------


def missing(poses, joints):
    poses = poses.copy()
    poses[:, joints] = np.nan
    return poses


def test_a_presence_channel_sees_the_mask(person_lifter):
    poses = people(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = person_lifter(missing(poses, [13, 16]), image_size=SIZE)
    assert bool(torch.isfinite(result.hypotheses).all())
    assert torch.isnan(result.keypoints_2d[0, [13, 16]]).all()
    assert result.confidence[0].tolist() == [0.0 if joint in (13, 16) else 1.0 for joint in range(17)]
    assert difference(result.hypotheses, person_lifter(poses, image_size=SIZE).hypotheses) > 1e-4
    # NaN, a confidence of 0 and a NaN confidence are the same, whatever the coordinates say.
    for confidence in (0.0, np.nan):
        marked = np.concatenate((poses, np.ones((1, 17, 1))), axis=-1)
        marked[:, [13, 16]] = (12345.0, -777.0, confidence)
        assert torch.equal(person_lifter(marked, image_size=SIZE).hypotheses, result.hypotheses)
    seen = make_conditioning(
        result.keypoints_2d, result.confidence > 0, person_lifter.config, image_size=torch.tensor([[1000.0, 800.0]])
    )
    assert seen.condition[0, :, 2].tolist() == result.confidence[0].tolist()
    assert torch.equal(seen.condition[0, [13, 16]], torch.zeros(2, 3))


def test_without_one_they_are_filled_with_one_warning(image_lifter):
    gaps = missing(people(3), [13, 16])
    with pytest.warns(UserWarning, match="6 missing joints are filled by the mean pose") as caught:
        result = image_lifter(gaps, image_size=SIZE)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert bool(torch.isfinite(result.hypotheses).all())
    assert torch.isnan(result.keypoints_2d[:, [13, 16]]).all()  # what was given, not what was filled in
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_lifter(people(1), image_size=SIZE)


@pytest.mark.parametrize("kind", ["person", "image"])
def test_the_filled_pose_is_a_similarity_of_the_mean_pose(kind, tmp_path):
    from diffupose.mean_pose import fill_missing_joints, mean_pose_2d

    angle = 0.4
    turn = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    joints = 17 if kind == "person" else 16
    pose = (120.0 * mean_pose_2d(joints) @ turn + torch.tensor([400.0, 300.0])).unsqueeze(0)
    present = torch.ones(1, joints, dtype=torch.bool)
    present[0, [2, 5, 9, 12]] = False
    filled = fill_missing_joints(torch.where(present[..., None], pose, torch.nan), present)
    assert difference(filled, pose) < 1e-3


def test_more_than_half_missing_is_unusable(lifter):
    poses = people(3)
    poses[1, :9] = np.nan  # 8 of 17 are left
    with pytest.raises(ValueError, match="row 1 has more than half of the joints missing"):
        lifter(poses, image_size=SIZE)
    intrinsics = matrix(900, 900, 500, 400)
    result = lifter(poses, image_size=SIZE, intrinsics=intrinsics, on_unusable="nan")
    assert result.usable.tolist() == [True, False, True]
    for value in (result.hypotheses, result.mean, result.medoid, result.covariance, result.translation):
        assert torch.isnan(value[1]).all()
        assert not torch.isnan(value[[0, 2]]).any()
    complete = lifter(people(3), image_size=SIZE, intrinsics=intrinsics).hypotheses
    assert difference(result.hypotheses[[0, 2]], complete[[0, 2]]) < CLOSE


@pytest.mark.filterwarnings("ignore:.*filled by the mean pose")
def test_exactly_half_is_enough(lifter):
    poses = people(1)
    poses[0, :8] = np.nan  # 9 of 17 are left
    assert bool(torch.isfinite(lifter(poses, image_size=SIZE).hypotheses).all())


def test_a_person_at_one_point_is_unusable(lifter):
    poses = np.full((1, 17, 2), 300.0)
    with pytest.raises(ValueError, match="all joints at one point"):
        lifter(poses, image_size=SIZE)
    result = lifter(poses, image_size=SIZE, on_unusable="nan")
    assert torch.isnan(result.hypotheses).all() and not result.usable.any()


def test_sixteen_joints_fill_seventeen(person_lifter):
    poses = people(2)
    without = np.delete(poses, 9, axis=1)
    expected = person_lifter(missing(poses, [9]), image_size=SIZE)
    result = person_lifter(without, image_size=SIZE)
    assert torch.equal(result.hypotheses, expected.hypotheses)
    assert torch.isnan(result.keypoints_2d[:, 9]).all()


def test_seventeen_joints_into_sixteen(tmp_path):
    lifter = tiny_lifter(tmp_path, "image", "h36m_16")
    poses = people(2)
    result = lifter(poses, image_size=SIZE)
    assert result.hypotheses.shape == (2, 10, 16, 3)
    assert torch.equal(result.hypotheses, lifter(np.delete(poses, 9, axis=1), image_size=SIZE).hypotheses)


@pytest.mark.parametrize("skeleton", ["h36m_17", "h36m_16"])
@pytest.mark.parametrize("joints", [15, 18, 1])
def test_other_joint_counts_are_refused(tmp_path, skeleton, joints):
    lifter = tiny_lifter(tmp_path, "person", skeleton)
    with pytest.raises(ValueError, match=f"keypoints must have {skeleton[-2:]} joints for this model, got {joints}"):
        lifter(100 * np.random.default_rng(0).normal(size=(1, joints, 2)), image_size=SIZE)
