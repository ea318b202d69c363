"""Plain NumPy files."""

import zipfile

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import LAYOUTS, read_keypoints
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15


def poses(num_rows=3, num_joints=17, channels=2):
    array = np.random.default_rng(0).uniform(10, 400, (num_rows, num_joints, channels))
    array[..., 2:] = 0.9
    return array


def test_plain_array(files):
    given = poses(12)
    result = read_keypoints(files.npy(given))
    np.testing.assert_array_equal(result.keypoints[..., :2], given.astype(np.float32))
    assert (result.keypoints[..., 2] == 1).all()
    assert result.image_id.tolist() == [str(row) for row in range(12)]
    assert result.frame.tolist() == list(range(12)) and not result.person.any()
    assert (result.source_format, result.source_layout, result.score_threshold) == ("npy", "h36m", None)
    assert "layout h36m is assumed for an array of 17 joints, not coco" in result.notes
    single = read_keypoints(files.npy(given[0]))
    np.testing.assert_array_equal(single.keypoints, result.keypoints[:1])


@pytest.mark.parametrize(
    ("num_joints", "layout"),
    [(16, "h36m_16"), (15, "humaneva"), (25, "openpose_body25"), (18, "openpose_coco18"), (26, "halpe26")],
)
def test_layout_by_count(files, num_joints, layout):
    skeleton = HUMANEVA_15 if num_joints == 15 else H36M_17
    result = read_keypoints(files.npy(poses(2, num_joints, 3)), skeleton=skeleton)
    assert result.source_layout == layout and result.num_source_joints == num_joints
    assert f"layout {layout} is assumed" in result.notes[0]


def test_named_layout(files):
    result = read_keypoints(files.npy(poses()), layout="coco")
    assert result.source_layout == "coco" and not any("assumed" in note for note in result.notes)
    assert read_keypoints(files.npy(poses()), layout="auto").source_layout == "h36m"
    with pytest.raises(InputError, match="layout coco has 17 joints, got 16"):
        read_keypoints(files.npy(poses(2, 16)), layout="coco")


def test_missing_rows_are_empty_frames(files):
    given = poses(4, channels=3)
    given[1] = np.nan
    given[2, 5] = np.nan
    given[3, 6, 2] = 0.2
    result = read_keypoints(files.npy(given))
    assert result.frame.tolist() == [0, 2, 3] and result.image_id.tolist() == ["0", "2", "3"]
    assert (result.num_frames, result.num_empty_frames, result.num_below_threshold) == (4, 1, 1)
    assert result.keypoints[1, 5, 2] == 0 and np.isnan(result.keypoints[1, 5, :2]).all()


def test_zero_zero_is_missing_without_confidence(files):
    given = poses()
    given[0, 3] = 0
    result = read_keypoints(files.npy(given))
    assert result.keypoints[0, 3, 2] == 0
    assert any("1 joints at exactly (0, 0)" in note for note in result.notes)


def test_npz_fields(files):
    given, confidence = poses(4), np.full((4, 17), 0.5)
    path = files.npz(
        keypoints_2d=given, confidence=confidence, frame=[7, 3, 3, 0], person=[0, 1, 0, 2],
        image_id=["h", "d", "d", "a"], image_size=[640, 480], other=np.array([{}]),
    )  # fmt: skip
    result = read_keypoints(path)
    assert result.frame.tolist() == [0, 3, 3, 7] and result.person.tolist() == [2, 0, 1, 0]
    assert result.image_id.tolist() == ["a", "d", "d", "h"]
    np.testing.assert_array_equal(result.keypoints[..., :2], given[[3, 2, 1, 0]].astype(np.float32))
    assert result.image_size.tolist() == [[640, 480]] * 4
    assert (result.num_frames, result.num_empty_frames, result.source_format) == (8, 5, "npz")
    by_image = read_keypoints(files.npz(keypoints=given, image_id=[10, 9, 9, 8]))
    assert by_image.frame.tolist() == [0, 1, 1, 2] and by_image.image_id.tolist() == ["8", "9", "9", "10"]
    by_frame = read_keypoints(files.npz(keypoints=given, frame=[5, 5, 1, 1]))
    assert by_frame.person.tolist() == [0, 1, 0, 1] and by_frame.image_id.tolist() == ["1", "1", "5", "5"]
    assert read_keypoints(files.npz(anything=given)).keypoints.shape == (4, 17, 3)


@pytest.mark.parametrize("skeleton", [H36M_17, H36M_16], ids=["17", "16"])
def test_round_trip_of_lift(files, entry, skeleton):
    entries = [entry(image_id, score, shift=score) for image_id in (3, 20, 100) for score in (0.7, 0.9)]
    entries[0]["keypoints"][32] = 0.1
    entries[2]["keypoints"][35] = 0.7  # on a threshold that float32 rounds down
    entries.append(entry(4, confidence=0.1))
    first = read_keypoints(files.json(entries), skeleton=skeleton, score_threshold=0.7)
    shuffled = np.random.default_rng(0).permutation(len(first.frame))
    path = files.npz(
        poses_3d=np.zeros((*first.keypoints.shape[:2], 3)), keypoints_2d=first.keypoints[shuffled, :, :2],
        confidence=first.keypoints[shuffled, :, 2], frame=first.frame[shuffled], person=first.person[shuffled],
        image_id=first.image_id[shuffled], joint_names=np.array(skeleton.joint_names), meta=np.array("{}"),
    )  # fmt: skip
    second = read_keypoints(path, skeleton=skeleton, score_threshold=0.7)
    for name in ("keypoints", "frame", "person", "image_id", "frame_ids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert second.source_format == "lift" and second.notes == ()
    assert (second.num_frames, second.num_empty_frames) == (4, 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 17, 2)), "flatten frames and people to rows"),
        (np.zeros((2, 17)), r"must have shape \[J, 2 or 3\] or \[B, J, 2 or 3\], got \(2, 17\)"),
        (np.zeros((2, 17, 4)), r"got \(2, 17, 4\)"),
        (np.zeros(()), r"got \(\)"),
        (np.full((2, 14, 2), 9.0), r"must be one of 17 \(h36m\), .*, got 14"),
        (np.full((2, 17, 2), "9"), "keypoints must be numbers, got <U1"),
        (np.full((2, 17, 2), True), "keypoints must be numbers, got bool"),
        (np.full((2, 17, 2), 1j), "keypoints must be numbers, got complex128"),
        (np.array([{}]), "pickled objects, which are never loaded"),
        (np.zeros((0, 17, 2)), "no person in any frame"),
        (np.full((2, 17, 2), np.nan), "all joints are missing in all 2 rows"),
        (np.zeros((2, 17, 3)), "all joints are missing"),
        (np.full((2, 17, 2), np.inf), r"row 0, joint 0 \(Hip\) is infinite"),
        (np.full((2, 17, 2), -2e6), "is beyond"),
        (np.linspace(0, 1, 68).reshape(2, 17, 2), "coordinates must be pixels"),
        (np.linspace(-900, 3000, 102).reshape(2, 17, 3), r"a confidence, got .* \(a 3D pose\?\)"),
    ],
)
def test_bad_arrays(files, array, message):
    with pytest.raises(InputError, match=message):
        read_keypoints(files.npy(array))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"keypoints": poses(2), "keypoints_2d": poses(2)}, "holds both"),
        ({"a": poses(2), "b": poses(2)}, "needs an array keypoints or keypoints_2d, holds a, b"),
        ({}, "holds nothing"),
        ({"keypoints": np.array([{}])}, "pickled objects"),
        ({"keypoints": poses(2), "image_id": np.array([{}, {}])}, "pickled objects"),
        ({"keypoints": poses(2, channels=3), "confidence": np.ones((2, 17))}, "got both"),
        ({"keypoints": poses(2), "confidence": np.ones(17)}, r"confidence must be numbers of shape \(2, 17\)"),
        ({"keypoints": poses(2), "frame": [0.0, 1.0]}, r"frame must be integers of shape \(2,\), got float64"),
        ({"keypoints": poses(2), "frame": [0]}, "frame must be integers"),
        ({"keypoints": poses(2), "frame": [-1, 0]}, "frame must not be negative"),
        ({"keypoints": poses(2), "frame": [0, 0], "image_id": ["a", "b"]}, "contradict each other"),
        ({"keypoints": poses(2), "frame": [0, 1], "image_id": ["a", "a"]}, "contradict each other"),
        ({"keypoints": poses(2), "frame": [4, 4], "person": [1, 1]}, "row 1: person 1 of image id 4 stands twice"),
        ({"keypoints": poses(2), "person": [0, 1]}, "person needs frame or image_id"),
        ({"keypoints": poses(2), "image_size": [640, 0]}, "image_size must be positive"),
        ({"keypoints": poses(2), "image_size": [640, np.nan]}, "image_size must be positive"),
        ({"keypoints": poses(2), "image_size": [640]}, r"image_size must be numbers of shape \(2,\) or \(2, 2\)"),
        ({"keypoints": poses(2), "image_size": [3, 3]}, "image sizes outside the image"),
    ],
)
def test_bad_npz(files, arrays, message):
    with pytest.raises(InputError, match=message):
        read_keypoints(files.npz(**arrays))


def test_damaged_files(files):
    whole = files.npz(keypoints=poses(50)).read_bytes()
    for content in (whole[:100], whole[: len(whole) // 2], whole[:60] + b"\xff" * 200 + whole[260:]):
        with pytest.raises(InputError, match="not a readable NumPy file"):
            read_keypoints(files.bytes(content, "broken.npz"))
    plain = files.npy(poses(50)).read_bytes()
    for content in (plain[:8], plain[:50], plain[:-1]):
        with pytest.raises(InputError, match="not a readable NumPy file"):
            read_keypoints(files.bytes(content, "broken.npy"))
    with zipfile.ZipFile(files.folder / "other.zip", "w") as other:
        other.writestr("keypoints", "text")
    with pytest.raises(InputError, match="a zip file, but keypoints in it is no NumPy array"):
        read_keypoints(files.folder / "other.zip")


def test_every_layout_is_reachable_by_name(files):
    for name, layout in LAYOUTS.items():
        skeleton = HUMANEVA_15 if name == "humaneva" else H36M_17
        result = read_keypoints(files.npy(poses(2, layout.num_joints)), layout=name, skeleton=skeleton)
        assert result.source_layout == name
