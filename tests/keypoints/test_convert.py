"""Conversions against arithmetic written out by hand."""

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import LAYOUTS, convert_keypoints
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15, SKELETONS, Skeleton

MISSING = [np.nan, np.nan, 0.0]
# Nose, LEye, REye, LEar, REar, LShoulder, RShoulder, arms, LHip, RHip, legs of a person seen from the front.
COCO_POINTS = {
    "Nose": (100, 60), "LEye": (104, 56), "REye": (96, 56), "LEar": (110, 58), "REar": (90, 58),
    "LShoulder": (130, 100), "RShoulder": (70, 100), "LElbow": (140, 140), "RElbow": (60, 140),
    "LWrist": (150, 180), "RWrist": (50, 180), "LHip": (115, 200), "RHip": (85, 200), "LKnee": (116, 260),
    "RKnee": (84, 260), "LAnkle": (117, 320), "RAnkle": (83, 320),
}  # fmt: skip
EXTRA_POINTS = {"Neck": (100, 96), "MidHip": (100, 196), "HeadTop": (100, 36)}


def pose(layout, confidence=0.9, **changed):
    """Build a pose of a layout from the points above; toes are at (0.5, 400)."""
    points = {**COCO_POINTS, **EXTRA_POINTS}
    rows = [(*points.get(name, (0.5, 400)), confidence) for name in LAYOUTS[layout].joint_names]
    for name, value in changed.items():
        rows[LAYOUTS[layout].index(name)] = value
    return np.array(rows, dtype=np.float64)


def test_coco_known_values():
    converted = convert_keypoints(pose("coco"), "coco", H36M_17)
    expected = [
        (100, 200), (85, 200), (84, 260), (83, 320), (115, 200), (116, 260), (117, 320),
        (100, 150),  # spine: middle of (100, 200) and (100, 100)
        (100, 100),
        (100, 100 + 0.70 * (59 - 100)),  # the mean of nose (100, 60) and ears (100, 58) is (100, 59)
        (100, 100 + 1.14 * (58 - 100)),
        (130, 100), (140, 140), (150, 180), (70, 100), (60, 140), (50, 180),
    ]  # fmt: skip
    np.testing.assert_allclose(converted[:, :2], expected, atol=1e-12)
    np.testing.assert_array_equal(converted[:, 2], 0.9)


def test_mean_eyes():
    converted = convert_keypoints(pose("coco"), "coco", H36M_17, head="mean_eyes")
    np.testing.assert_array_equal(converted[9], [100, 60, 0.9])
    np.testing.assert_array_equal(converted[10], [100, 56, 0.9])


@pytest.mark.parametrize(
    ("layout", "pelvis", "thorax"),
    [
        ("openpose_body25", (100, 196), (100, 96)),
        ("openpose_coco18", (100, 200), (100, 96)),
        ("halpe26", (100, 196), (100, 96)),
    ],
)
def test_other_detectors(layout, pelvis, thorax):
    converted = convert_keypoints(pose(layout), layout, H36M_17)
    from_coco = convert_keypoints(pose("coco"), "coco", H36M_17)
    limbs = [1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16]
    np.testing.assert_array_equal(converted[limbs], from_coco[limbs])
    np.testing.assert_allclose(converted[0, :2], pelvis)
    np.testing.assert_allclose(converted[8, :2], thorax)
    np.testing.assert_allclose(converted[7, :2], (100, (pelvis[1] + thorax[1]) / 2))
    np.testing.assert_allclose(converted[9, :2], (100, 96 + 0.70 * (59 - 96)))
    np.testing.assert_allclose(converted[10, :2], (100, 96 + 1.14 * (58 - 96)))
    eyes = convert_keypoints(pose(layout), layout, H36M_17, head="mean_eyes")
    np.testing.assert_array_equal(eyes[10, :2], (100, 36) if layout == "halpe26" else (100, 56))


def test_neck_and_mid_hip_fall_back():
    given = pose("openpose_body25", Neck=(0, 0, 0), MidHip=(0, 0, 0))
    converted = convert_keypoints(given, "openpose_body25", H36M_17)
    np.testing.assert_array_equal(converted, convert_keypoints(pose("coco"), "coco", H36M_17))


def test_head_top_is_used_without_ears():
    converted = convert_keypoints(pose("halpe26", LEar=MISSING, REar=MISSING), "halpe26", H36M_17)
    np.testing.assert_allclose(converted[10, :2], (100, 96 + 0.90 * (36 - 96)))
    assert converted[9, 2] == 0


def test_confidence_is_that_of_the_least_parent():
    given = pose("coco", LHip=(115, 200, 0.4), LShoulder=(130, 100, 0.5), Nose=(100, 60, 0.2), LEar=(110, 58, 0.3))
    converted = convert_keypoints(given, "coco", H36M_17)
    np.testing.assert_allclose(converted[[0, 7, 8, 9, 10], 2], [0.4, 0.4, 0.5, 0.2, 0.3])


@pytest.mark.parametrize("absent", [(0.0, 0.0, 0.0), (np.nan, np.nan, 0.9), (50.0, 50.0, np.nan), (1.0, np.nan, 1.0)])
def test_missing_parent_makes_missing(absent):
    converted = convert_keypoints(pose("coco", LHip=absent), "coco", H36M_17)
    for joint in (0, 4, 7):
        np.testing.assert_array_equal(converted[joint], MISSING)
    assert (converted[[1, 2, 3, 8, 9, 10], 2] == 0.9).all()


def test_profile_uses_the_ear_that_is_seen():
    converted = convert_keypoints(pose("coco", REar=(0, 0, 0)), "coco", H36M_17)
    np.testing.assert_allclose(converted[10, :2], (100 + 1.14 * 10, 100 + 1.14 * (58 - 100)))
    np.testing.assert_allclose(converted[9, :2], (100 + 0.70 * 5, 100 + 0.70 * (59 - 100)))
    both = convert_keypoints(pose("coco", REar=(0, 0, 0), LEar=(0, 0, 0)), "coco", H36M_17)
    assert both[9, 2] == both[10, 2] == 0
    back = convert_keypoints(pose("coco", Nose=(0, 0, 0)), "coco", H36M_17)
    assert back[9, 2] == 0 and back[10, 2] == 0.9


def test_joint_9_is_dropped_and_missing():
    seventeen = np.arange(51, dtype=np.float64).reshape(17, 3) + 1
    sixteen = convert_keypoints(seventeen, "h36m", H36M_16)
    np.testing.assert_array_equal(sixteen, np.delete(seventeen, 9, axis=0))
    back = convert_keypoints(sixteen, "h36m_16", H36M_17)
    np.testing.assert_array_equal(back[9], MISSING)
    np.testing.assert_array_equal(np.delete(back, 9, axis=0), sixteen)
    from_coco = convert_keypoints(pose("coco"), "coco", H36M_17)
    np.testing.assert_array_equal(convert_keypoints(pose("coco"), "coco", H36M_16), np.delete(from_coco, 9, axis=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mirroring_commutes(layout):
    skeleton = HUMANEVA_15 if layout == "humaneva" else H36M_17
    given = np.random.default_rng(0).uniform(1, 500, (5, LAYOUTS[layout].num_joints, 3))
    mirrored = given[:, LAYOUTS[layout].flip_permutation] * [-1, 1, 1]
    expected = convert_keypoints(given, layout, skeleton)[:, skeleton.flip_permutation] * [-1, 1, 1]
    np.testing.assert_allclose(convert_keypoints(mirrored, layout, skeleton), expected)


def test_edges():
    for shape in ((0, 17, 3), (2, 3, 17, 3), (17, 3)):
        given = np.ones(shape, dtype=np.float32)
        converted = convert_keypoints(given, "coco", H36M_17)
        assert converted.shape == shape and converted.dtype == np.float32
    given = np.zeros((17, 3))
    before = given.copy()
    convert_keypoints(given, "h36m", H36M_17)[:] = 7
    np.testing.assert_array_equal(given, before)
    assert convert_keypoints(np.ones((4, 17, 3), dtype=int), "h36m", H36M_16).dtype == np.float64


def test_errors():
    with pytest.raises(InputError, match=r"shape \[\.\.\., 17, 3\] for layout coco, got float64 \(16, 3\)"):
        convert_keypoints(np.zeros((16, 3)), "coco", H36M_17)
    with pytest.raises(InputError, match="got object"):
        convert_keypoints(np.zeros((17, 3), dtype=object), "coco", H36M_17)
    with pytest.raises(InputError, match="layout must be one of auto, h36m"):
        convert_keypoints(np.zeros((17, 3)), "cocoo", H36M_17)
    with pytest.raises(InputError, match="layout must be named"):
        convert_keypoints(np.zeros((17, 3)), "auto", H36M_17)
    with pytest.raises(InputError, match="head must be one of extrapolated, mean_eyes"):
        convert_keypoints(np.zeros((17, 3)), "coco", H36M_17, head="top")
    for layout in ("h36m", "h36m_16", "coco"):
        with pytest.raises(InputError, match="does not convert to the 15 joints"):
            convert_keypoints(np.zeros((LAYOUTS[layout].num_joints, 3)), layout, HUMANEVA_15)
    for skeleton in (H36M_17, H36M_16):
        with pytest.raises(InputError, match=r"humaneva \(15 joints\) does not convert"):
            convert_keypoints(np.zeros((15, 3)), "humaneva", skeleton)
    other = Skeleton("stick", ("a", "b"), (-1, 0), (), ())
    assert other.name not in SKELETONS
    with pytest.raises(InputError, match="skeleton must be"):
        convert_keypoints(np.zeros((17, 3)), "h36m", other)
