"""What does not depend on the format: arguments, recognition by content, broken text."""

import json
import pickle
import random

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import read_keypoints
from diffupose.keypoints.images import natural_key


def test_content_decides_not_the_name(files, entry):
    array = np.random.default_rng(0).uniform(10, 400, (2, 17, 2))
    assert read_keypoints(files.bytes(files.npy(array).read_bytes(), "a.json")).source_format == "npy"
    assert read_keypoints(files.bytes(files.npz(keypoints=array).read_bytes(), "b.npy")).source_format == "npz"
    assert read_keypoints(files.json([entry()], "c.npz")).source_format == "coco_results"
    with_mark = b"\xef\xbb\xbf" + json.dumps([entry()]).encode()
    assert read_keypoints(str(files.bytes(with_mark))).source_format == "coco_results"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\t", "the file is empty"),
        (b'[{"image_id": 1,\n  "keypoints": [1, 2,, 3]}]', "broken JSON at line 2 column 22"),
        (b"[1, 2", "broken JSON at line 1 column 6"),
        (b"x,y,confidence\n1,2,3\n", "broken JSON at line 1 column 1"),
        (pickle.dumps({"keypoints": [1, 2]}), "neither text nor a NumPy file; supported are COCO results"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "neither text nor a NumPy file"),
        (b"null", "not a keypoint file known here .the JSON is None"),
        (b"3", "not a keypoint file known here"),
        (b'"text"', "not a keypoint file known here"),
        (b"{}", "its keys are none"),
        (b"[3]", "entry 0: expected an object with image_id and keypoints, got 3"),
        (b'{"a": 1, "b": 2}', "its keys are a, b.*supported are COCO results"),
        (b'{"meta_info": {}, "instance_info": []}', "looks like MMPose's"),
        (b'[{"keypoints": [[1, 2]], "keypoint_scores": [1]}]', "looks like MMPose's"),
        (b'[{"frame_id": 0, "instances": []}]', "looks like MMPose's"),
        (b'{"bodies": []}', "looks like AlphaPose's cmu format"),
        (b'{"pose_landmarks": []}', "looks like MediaPipe's"),
        (b'{"poses_3d": []}', "looks like lift's JSON: give its .npz"),
    ],
)
def test_other_content(files, content, message):
    path = files.bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_keypoints(path)
    assert str(path) in str(caught.value)


def test_missing_file(files):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_keypoints(files.folder / "nowhere.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "smpl"}, "layout must be one of auto, h36m, .*, got 'smpl'"),
        ({"head": "top"}, "head must be one of"),
        ({"image_size": (640, 0)}, "image_size must be positive"),
        ({"image_size": (-640, 480)}, r"image_size must be positive .* got \(-640, 480\)"),
        ({"image_size": (640, float("nan"))}, "image_size must be positive"),
        ({"image_size": (640, float("inf"))}, "image_size must be positive"),
        ({"image_size": (640,)}, "image_size must be two numbers"),
        ({"image_size": 640}, "image_size must be two numbers"),
        ({"image_size": (True, 480.0)}, "image_size must be two numbers"),
        ({"image_size": ("640", "480")}, "image_size must be two numbers"),
        ({"image_size": (10**400, 480)}, "image_size must be two numbers"),
        ({"image_size": (640, 480), "annotations": "a.json"}, "give image_size or annotations, not both"),
        ({"score_threshold": 1.5}, r"score_threshold must be a number in 0\.\.1 or None, got 1.5"),
        ({"score_threshold": -0.1}, "score_threshold must be"),
        ({"score_threshold": float("nan")}, "score_threshold must be"),
        ({"score_threshold": True}, "score_threshold must be"),
        ({"score_threshold": "0.3"}, "score_threshold must be"),
    ],
)
def test_bad_arguments(files, entry, options, message):
    with pytest.raises(InputError, match=message):
        read_keypoints(files.json([entry()]), **options)


def test_image_size(files, entry):
    result = read_keypoints(files.json([entry(1), entry(2)]), image_size=np.array([640, 480]))
    assert result.image_size.tolist() == [[640, 480]] * 2 and result.image_size.dtype == np.float64


def test_natural_order():
    expected = ["", "1", "01", "2", "10", "10a", "a", "a1", "a1b", "a2", "a10", "a" + "9" * 5000, "b"]
    expected[1:3] = sorted(["1", "01"])
    shuffled = expected.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_key) == expected


def test_odd_image_ids(files, entry):
    ids = ["\ud800", "ü/1.jpg", "a b", 10**30]
    result = read_keypoints(files.json([entry(image_id) for image_id in ids]))
    assert set(result.image_id.tolist()) == {str(image_id) for image_id in ids}
    assert len(set(result.frame_ids.tolist())) == 4
