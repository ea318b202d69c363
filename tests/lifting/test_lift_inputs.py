"""Keypoints, image sizes and camera matrices that the Lifter refuses or brings to one form."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch
from support.tiny_lifters import people

from diffupose.datasets.mocap import load_mocap
from diffupose.datasets.virtual_cameras import TRAINING_RANGES, detect, turn_heading, wild_views
from diffupose.keypoints.plausible import why_unusable
from diffupose.lifting.inputs import check_image_size, check_intrinsics, check_keypoints
from diffupose.skeleton import H36M_16, H36M_17


def changed(value, index=(0, 3)):
    poses = np.concatenate((people(2), np.ones((2, 17, 1))), axis=-1)
    poses[index] = value
    return poses


def test_known_values():
    poses = changed((np.nan, 5.0, 0.5))
    poses[1, 4] = (7.0, 8.0, 0.25)
    pixels = check_keypoints(poses, H36M_17, "error")
    assert pixels.keypoints.dtype == pixels.confidence.dtype == torch.float32
    assert pixels.keypoints[1, 4].tolist() == [7.0, 8.0]
    assert pixels.confidence[1, 4] == 0.25
    assert torch.isnan(pixels.keypoints[0, 3]).all()  # both coordinates, though one was there
    assert pixels.confidence[0, 3] == 0.0 and not pixels.present[0, 3]
    assert int(pixels.present.sum()) == 33
    assert pixels.usable.tolist() == [True, True]


def test_the_input_is_not_changed():
    poses = changed((np.nan, np.nan, 0.0))
    before = poses.copy()
    pixels = check_keypoints(poses, H36M_17, "error")
    pixels.keypoints.zero_()
    assert np.array_equal(poses, before, equal_nan=True)


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        (np.zeros(17), r"keypoints must have shape \[B, 17, 2 or 3\], got \(17,\)"),
        (np.zeros((17, 4)), "keypoints must have shape"),
        (np.zeros((1, 17, 1)), "keypoints must have shape"),
        (np.zeros((2, 12, 2)), "keypoints must have 17 joints for this model, got 12"),
        ([["a", "b"]] * 17, "keypoints must be an array of numbers"),
        ([[1.0, 2.0], [3.0]], "keypoints must be an array of numbers"),
        (None, "keypoints must be an array of numbers"),
        (np.zeros((17, 2), dtype=bool), "keypoints must be an array of numbers"),
        (np.zeros((17, 2), dtype=complex), "keypoints must be an array of numbers"),
        (changed((np.inf, 5.0, 1.0)), "keypoints must be finite .* row 0, joint 3"),
        (changed((5.0, -np.inf, 1.0)), "keypoints must be finite"),
        (changed((5.0, 5.0, np.inf)), "keypoints must have a confidence as third number, got inf in row 0, joint 3"),
        (changed((5.0, 5.0, 4321.0), (1, 2)), r"got 4321 in row 1, joint 2 \(a 3D pose"),
        (changed((5.0, 5.0, -4321.0)), "keypoints must have a confidence as third number"),
        (changed((5.0, 2e6, 1.0)), "keypoints must be pixels, got .* row 0, joint 3"),
        (changed((1e300, 5.0, 1.0)), "keypoints must be pixels"),
        (people(2) / 1000.0, "they look normalised already"),
        (people(2) / 500.0 - 1.0, "they look normalised already"),
        (np.full((1, 17, 2), np.nan), "row 0 has more than half of the joints missing"),
        (np.full((1, 17, 2), 4.0), "row 0 has all joints at one point"),
    ],
)
def test_refused_keypoints(keypoints, message):
    with pytest.raises(ValueError, match=message):
        check_keypoints(keypoints, H36M_17, "error")


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300, 5.0])
@pytest.mark.parametrize("confidence", [0.0, -1.0, -0.1])
def test_coordinates_of_missing_joints_do_not_matter(value, confidence):
    pixels = check_keypoints(changed((value, 5.0, confidence)), H36M_17, "error")
    assert not pixels.present[0, 3] and pixels.confidence[0, 3] == 0.0


def test_confidence_is_capped_as_in_files():
    assert check_keypoints(changed((5.0, 5.0, 12.0)), H36M_17, "error").confidence[0, 3] == 1.0


# A person seen to the wrists only: head, arms and the thorax, 9 joints of 17.
BUST = people(1)[0]
BUST[:8] = np.nan


def with_points(pose, **points):
    pose = pose.copy()
    for name, point in points.items():
        pose[int(name[1:])] = point
    return pose


HEIGHT = float(np.ptp(people(1)[0], axis=0).max())


@pytest.mark.parametrize(
    ("pose", "usable"),
    [
        (with_points(people(1)[0], j3=(15000.0, 900.0)), False),
        (with_points(people(1)[0], j3=(-2500.0, 400.0), j6=(-2500.0, 420.0)), False),
        (with_points(people(1)[0], j3=(500.0, 3000.0), j13=(500.0, -2500.0)), False),
        # A hip that went astray takes the middle of the hips and the spine along.
        (with_points(people(1)[0], j1=(6500.0, 400.0), j0=(3500.0, 400.0), j7=(2000.0, 400.0)), False),
        (with_points(people(1)[0], j3=(500.0, 400.0 + 2 * HEIGHT)), True),
        (with_points(BUST, j6=(500.0, 400.0 + HEIGHT)), True),
        (with_points(BUST, j3=(480.0, 400.0 + HEIGHT), j6=(500.0, 400.0 + HEIGHT)), True),
        (people(1)[0] * np.array([0.1, 1.0]), True),
        (people(1)[0] * np.array([1.0, 0.1]), True),  # foreshortened
        (people(1)[0] * 0.02 - 5.0, True),  # a tiny person
    ],
)
def test_a_joint_too_far_from_all_others(pose, usable):
    rows = np.stack([people(1)[0], pose])
    assert check_keypoints(rows, H36M_17, "nan").usable.tolist() == [True, usable]
    assert check_keypoints(rows, H36M_16, "nan").usable.tolist() == [True, usable]
    if not usable:
        with pytest.raises(ValueError, match="row 1 has a joint too far from all others"):
            check_keypoints(rows, H36M_17, "error")


def test_no_real_pose_is_refused():
    """People in every direction, also from above and below, foreshortened, with a detector's noise, or cut off."""
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        positions = torch.from_numpy(load_mocap(path).positions)
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(len(positions), 3, 3, generator=generator))[0]
    for poses in (positions, positions @ turned):
        views = wild_views(turn_heading(poses, generator), TRAINING_RANGES, generator)
        for seen in (views, detect(views, torch.ones(len(poses)), generator)):
            keypoints = seen.keypoints_2d.where(seen.present[..., None], torch.nan).numpy()
            without_legs = keypoints.copy()
            without_legs[:, [2, 3, 5, 6]] = np.nan
            for rows in (keypoints, without_legs):
                problems = why_unusable(rows[views.usable.numpy()], H36M_17)
                assert len(problems) > 1000 and set(problems) <= {None, "more than half of the joints missing"}


def test_one_normalised_row_among_pixels():
    rows = np.concatenate([people(1), people(1) / 1000.0, people(1)])
    assert check_keypoints(rows, H36M_17, "nan").usable.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"row 1 has all joints within ±1\.5: normalised already"):
        check_keypoints(rows, H36M_17, "error")
    # Somebody a few pixels tall in the corner of the image is not, and a row of hardly any joints says nothing.
    rows[1] = 3.0 + 0.01 * (people(1)[0] - [500.0, 400.0])
    assert check_keypoints(rows, H36M_17, "nan").usable.all()
    rows[1] = np.nan
    rows[1, 4] = 1.0
    with pytest.raises(ValueError, match="row 1 has more than half of the joints missing"):
        check_keypoints(rows, H36M_17, "error")


@pytest.mark.parametrize(
    ("present", "joints", "usable"), [(9, 17, True), (8, 17, False), (8, 16, True), (7, 16, False), (0, 17, False)]
)
def test_half_of_the_joints(present, joints, usable):
    skeleton = H36M_17 if joints == 17 else H36M_16
    poses = people(1)[:, :joints].copy()
    poses[:, present:] = np.nan
    assert check_keypoints(poses, skeleton, "nan").usable.tolist() == [usable]


def test_joint_counts():
    poses = people(1)
    dropped = check_keypoints(poses, H36M_16, "error").keypoints.numpy()
    assert np.array_equal(dropped, np.delete(poses, 9, axis=1).astype(np.float32))
    filled = check_keypoints(dropped, H36M_17, "error")
    assert filled.present[0].tolist() == [joint != 9 for joint in range(17)]
    assert np.array_equal(filled.keypoints[:, filled.present[0]].numpy(), dropped)


@pytest.fixture
def pixels():
    return check_keypoints(people(2), H36M_17, "error")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1000, "image_size must be"),
        ((1000,), r"image_size must be \(w, h\) or have shape \[2, 2\]"),
        ((1000, 800, 3), "image_size must be"),
        ([(1000, 800)] * 3, "image_size must be"),
        ((0, 0), "image_size must hold positive pixels"),
        ((1000, -800), "image_size must hold positive pixels"),
        ((np.nan, 800), "image_size must hold positive pixels"),
        ((np.inf, 800), "image_size must hold positive pixels"),
        ((1e9, 1e9), "image_size must hold positive pixels"),
        ("big", "image_size must be an array of numbers"),
        ((10, 8), "keypoints must lie in or near the image"),
        ((150, 100), "keypoints must lie in or near the image"),  # 3 times 150 beyond
    ],
)
def test_refused_image_sizes(pixels, size, message):
    with pytest.raises(ValueError, match=message):
        check_image_size(size, pixels)


def test_rows_that_are_not_lifted_may_lie_anywhere():
    poses = people(2)
    poses[1, 3] = (15000.0, 900.0)
    pixels = check_keypoints(poses, H36M_17, "nan")
    assert check_image_size((1000, 800), pixels) is not None
    assert check_intrinsics(K, pixels.usable_keypoints) is not None


def test_image_sizes(pixels):
    assert check_image_size(None, pixels) is None
    assert check_image_size((1000, 800), pixels).tolist() == [[1000.0, 800.0]] * 2
    assert check_image_size([(1000, 800), (900, 700)], pixels).tolist() == [[1000.0, 800.0], [900.0, 700.0]]


K = np.array([[900.0, 0.0, 500.0], [0.0, 950.0, 400.0], [0.0, 0.0, 1.0]])


def with_entry(row, column, value):
    matrix = K.copy()
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        (K[:2], r"intrinsics must have shape \[3, 3\] or \[2, 3, 3\], got \(2, 3\)"),
        (np.stack([K] * 3), "intrinsics must have shape"),
        ((900, 900, 500, 400), "intrinsics must have shape"),
        (with_entry(0, 0, 0.0), r"intrinsics must be \[\[fx, 0, cx\]"),
        (with_entry(1, 1, -900.0), "intrinsics must be"),
        (with_entry(0, 0, np.nan), "intrinsics must be"),
        (with_entry(0, 2, np.inf), "intrinsics must be"),
        (with_entry(0, 0, 1e300), "intrinsics must be"),
        (with_entry(1, 2, -1e12), "intrinsics must be"),
        (with_entry(0, 1, 3.0), "intrinsics must be"),
        (with_entry(1, 0, 3.0), "intrinsics must be"),
        (with_entry(2, 2, 2.0), "intrinsics must be"),
        (K.T, "intrinsics must be"),
        (np.diag([1.15, 1.15, 1.0]), "row 0, joint 0 would lie more than 84 degrees off the optical axis"),
        (with_entry(0, 2, 90000.0), "off the optical axis"),
    ],
)
def test_refused_intrinsics(pixels, intrinsics, message):
    with pytest.raises(ValueError, match=message):
        check_intrinsics(intrinsics, pixels.keypoints)


def test_intrinsics(pixels):
    assert check_intrinsics(None, pixels.keypoints) is None
    assert check_intrinsics(K, pixels.keypoints).shape == (1, 3, 3)
    both = check_intrinsics(np.stack([K, 2 * K / K[2, 2] - np.diag([0, 0, 1.0])]), pixels.keypoints)
    assert both.dtype == torch.float32 and both[1, 0, 0] == 1800.0
    gaps = pixels.keypoints.clone()
    gaps[0, 3] = torch.nan
    assert torch.equal(check_intrinsics(K.tolist(), gaps), torch.from_numpy(K).float()[None])
