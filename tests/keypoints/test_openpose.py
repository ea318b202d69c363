"""OpenPose files and folders."""

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import convert_keypoints, read_keypoints
from diffupose.skeleton import H36M_17


def people(*rows, key="pose_keypoints_2d"):
    return {"version": 1.3, "people": [{"person_id": [-1], key: row, "face_keypoints_2d": []} for row in rows]}


@pytest.mark.parametrize(
    ("num_joints", "layout"), [(25, "openpose_body25"), (18, "openpose_coco18"), (26, "halpe26"), (17, "coco")]
)
def test_layout_by_count(files, person, num_joints, layout):
    result = read_keypoints(files.json(people(person(num_joints)), "v_000000000012_keypoints.json"))
    assert (result.source_format, result.source_layout) == ("openpose", layout)
    assert result.num_source_joints == num_joints and result.image_id.tolist() == ["v_000000000012"]
    expected = convert_keypoints(np.array(person(num_joints)).reshape(1, -1, 3), layout, H36M_17)
    np.testing.assert_array_equal(result.keypoints, expected.astype(np.float32))
    assert any(f"layout {layout}" in note for note in result.notes)


def test_old_key_and_any_name(files, person):
    result = read_keypoints(files.json(people(person(18), key="pose_keypoints"), "frame.txt"))
    assert result.source_layout == "openpose_coco18" and result.image_id.tolist() == ["frame"]


def test_folder(files, person):
    files.json(people(person(25, shift=4), person(25)), "run/v_10_keypoints.json")
    files.json(people(person(25)), "run/v_2_keypoints.json")
    files.json(people(), "run/v_3_keypoints.json")
    files.json(people([]), "run/v_11_keypoints.json")  # hands only
    files.bytes(b"not JSON", "run/notes.json")
    result = read_keypoints(files.folder / "run")
    assert result.image_id.tolist() == ["v_2", "v_10", "v_10"]
    assert result.frame.tolist() == [0, 2, 2] and result.person.tolist() == [0, 0, 1]
    assert (result.num_frames, result.num_empty_frames) == (4, 2)
    assert result.keypoints[:, 1, 0].tolist() == [90, 90, 94]  # RHip is BODY_25's joint 9


def test_folder_with_annotations(files, person):
    files.json(people(person(25)), "run/v_2_keypoints.json")
    files.json(people(), "run/v_1_keypoints.json")
    images = [{"id": row, "file_name": f"v_{row}.png", "width": 640, "height": 480} for row in (1, 2, 3)]
    result = read_keypoints(files.folder / "run", annotations=files.json({"images": images}, "images.json"))
    assert result.image_size.tolist() == [[640, 480]]
    assert (result.frame.tolist(), result.num_frames, result.num_empty_frames) == ([1], 3, 2)


def test_missing_is_zero(files, person):
    row = person(25)
    row[3 * 10 : 3 * 11] = [0, 0, 0]
    result = read_keypoints(files.json(people(row)))
    assert np.flatnonzero(result.keypoints[0, :, 2] == 0).tolist() == [2]


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_keypoint_scale(files, low):
    rng = np.random.default_rng(0)
    row = np.column_stack([rng.uniform(low, 1, (25, 2)), np.ones(25)]).ravel().tolist()
    with pytest.raises(InputError, match="--keypoint_scale 0"):
        read_keypoints(files.json(people(row)))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"people": [{"pose_keypoints_3d": []}]},
            r"people\[0\]: pose_keypoints_2d is not there, only pose_keypoints_3d",
        ),
        ({"people": [{}]}, "only nothing"),
        ({"people": [3]}, "expected an object with pose_keypoints_2d, got 3"),
        ({"people": None}, "must be an object with a list of people"),
        (people([1.0] * 33 * 3), r"must be one of 25 \(openpose_body25\), 18 .*, got 33"),
        (people([1.0] * 50), "got 50 numbers"),
        (people(["a"] * 75), "expected numbers, got 'a'"),
        (people(), "no person in any frame"),
        (people([0] * 75), "all joints are missing"),
    ],
)
def test_errors(files, document, message):
    with pytest.raises(InputError, match=message):
        read_keypoints(files.json(document))


def test_folder_errors(files, person):
    (files.folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"the folder has no \*_keypoints.json file"):
        read_keypoints(files.folder / "empty")
    files.json(people(), "run/a_keypoints.json")
    with pytest.raises(InputError, match="no person in any frame"):
        read_keypoints(files.folder / "run")
    files.json(people(person(25), person(18)), "run/b_keypoints.json")
    with pytest.raises(
        InputError, match=r"b_keypoints.json: people\[1\]: layout openpose_body25 has 25 joints, got 18"
    ):
        read_keypoints(files.folder / "run")
    files.bytes(b"{", "run/b_keypoints.json")
    with pytest.raises(InputError, match=r"b_keypoints.json: broken JSON at line 1 column 2"):
        read_keypoints(files.folder / "run")
    files.json([], "run/b_keypoints.json")
    with pytest.raises(InputError, match=r"b_keypoints\.json: an OpenPose file must be an object"):
        read_keypoints(files.folder / "run")
