"""COCO results and annotation files."""

import hashlib
import json
import random

import numpy as np
import pytest

from diffupose.errors import InputError
from diffupose.keypoints import convert_keypoints, frame_ids, read_keypoints
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15


def assert_same(first, second):
    """Compare two Keypoints field by field."""
    for name, value in vars(first).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)
        else:
            assert value == getattr(second, name), name


def test_known_values(files, entry, person):
    result = read_keypoints(files.json([entry("b.jpg"), entry("a.jpg", shift=3)]))
    expected = convert_keypoints(np.array([person(shift=3), person()]).reshape(2, 17, 3), "coco", H36M_17)
    np.testing.assert_array_equal(result.keypoints, expected.astype(np.float32))
    assert result.keypoints.dtype == np.float32
    assert result.image_id.tolist() == ["a.jpg", "b.jpg"]
    assert result.frame.tolist() == [0, 1] and result.person.tolist() == [0, 0]
    assert (result.source_format, result.source_layout, result.num_source_joints) == ("coco_results", "coco", 17)
    assert (result.num_frames, result.num_empty_frames, result.image_size) == (2, 0, None)
    assert (result.score_threshold, result.num_below_threshold) == (0.3, 0)
    assert result.skeleton is H36M_17
    assert result.notes == ("coco converted to h36m_17 by the head rule extrapolated",)


def test_frame_ids_are_blake2b(files, entry):
    result = read_keypoints(files.json([entry(7, 0.5), entry(7, 0.9)]))
    for row, text in enumerate((b"7\x000", b"7\x001")):
        expected = int.from_bytes(hashlib.blake2b(text).digest()[:8], "little")
        assert result.frame_ids.dtype == np.int64
        assert int(result.frame_ids.view(np.uint64)[row]) == expected
    assert len(set(frame_ids(["1", "11"], [12, 2]).tolist())) == 2


def test_order_of_the_file_does_not_matter(files, entry):
    entries = [
        entry(image_id, score, shift=shift, confidence=confidence)
        for image_id in (1, 2, 10, "10b", "010")
        for score, shift, confidence in ((0.9, 1, 0.9), (0.9, 0, 0.9), (None, 2, 0.9), (0.1, 2, 0.2), (0.1, 3, 0.4))
    ]
    sorted_file = read_keypoints(files.json(entries))
    assert list(dict.fromkeys(sorted_file.image_id.tolist())) == ["1", "2", "010", "10", "10b"]
    for seed in range(5):
        random.Random(seed).shuffle(entries)
        assert_same(read_keypoints(files.json(entries, f"{seed}.json")), sorted_file)


def test_people_are_ranked_by_score_then_keypoints(files, entry):
    entries = [entry(score=score, shift=shift) for score, shift in ((0.2, 0), (0.9, 5), (None, 0), (0.9, 3))]
    result = read_keypoints(files.json(entries))
    assert result.person.tolist() == [0, 1, 2, 3]
    # RHip is COCO's joint 12 at x = 120 + shift.
    assert result.keypoints[:, 1, 0].tolist() == [123, 125, 120, 120]
    twice = read_keypoints(files.json([entry(), entry()]))
    assert twice.person.tolist() == [0, 1]


def test_threshold(files, entry):
    document = [entry(score=0.01)]
    document[0]["keypoints"][2::3] = [0.3] * 17
    document[0]["keypoints"][3 * 14 + 2] = 0.29  # right knee
    kept = read_keypoints(files.json(document))
    assert kept.num_below_threshold == 1 and kept.score_threshold == 0.3  # a person's own low score is no reason
    assert np.flatnonzero(kept.keypoints[0, :, 2] == 0).tolist() == [2]
    assert np.isnan(kept.keypoints[0, 2, :2]).all()
    for threshold in (None, 0, 0.29):
        result = read_keypoints(files.json(document), score_threshold=threshold)
        assert result.num_below_threshold == 0 and (result.keypoints[0, :, 2] > 0).all()
        assert result.score_threshold == threshold
    with pytest.raises(InputError, match=r"all joints are below the score threshold 0\.5 \(the highest has 0\.3\)"):
        read_keypoints(files.json(document), score_threshold=0.5)


def test_threshold_does_not_renumber_people(files, entry):
    path = files.json([entry(score=0.9, confidence=0.1), entry(score=0.8), entry(2, confidence=0.1)])
    result = read_keypoints(path)
    assert result.person.tolist() == [1]
    assert result.frame_ids[0] == read_keypoints(path, score_threshold=None).frame_ids[1]
    assert (result.num_frames, result.num_empty_frames) == (2, 1)
    assert any("2 of 3 people" in note for note in result.notes)


def test_confidence_beyond_one(files, entry):
    document = [entry(confidence=0.1), entry(2, confidence=37.5)]
    result = read_keypoints(files.json(document))
    assert result.score_threshold is None and result.num_below_threshold == 0
    assert result.keypoints[:, 1, 2].tolist() == [np.float32(0.1), 1.0]
    assert any("confidences reach 37.5" in note for note in result.notes)


def test_null_nan_and_negative_confidence_are_missing(files, entry):
    document = [entry()]
    document[0]["keypoints"][3 * 11] = None
    document[0]["keypoints"][3 * 13 + 1] = float("nan")
    document[0]["keypoints"][3 * 15 + 2] = -0.5
    result = read_keypoints(files.json(document))
    assert np.flatnonzero(result.keypoints[0, :, 2] == 0).tolist() == [0, 4, 5, 6, 7]


def ground_truth(person, with_sizes=True):
    flags = person(confidence=2)
    flags[2] = 1
    flags[3 * 16 : 3 * 16 + 3] = [0, 0, 0]
    size = {"width": 640, "height": 480} if with_sizes else {}
    return {
        "images": [{"id": image_id, "file_name": f"{image_id}.jpg", **size} for image_id in (10, 9, 11)],
        "annotations": [
            {"image_id": 10, "keypoints": flags, "num_keypoints": 16, "iscrowd": 0},
            {"image_id": 10, "keypoints": [0] * 51, "num_keypoints": 0},
            {"image_id": 9, "bbox": [1, 2, 3, 4]},
        ],
        "categories": [{"name": "person", "keypoints": ["nose", "left_eye"]}],
    }


def test_ground_truth(files, person):
    result = read_keypoints(files.json(ground_truth(person)))
    assert (result.source_format, result.score_threshold) == ("coco_annotations", None)
    assert (result.num_frames, result.num_empty_frames) == (3, 2)
    assert result.frame.tolist() == [1] and result.image_id.tolist() == ["10"]
    assert result.image_size.tolist() == [[640, 480]]
    assert result.keypoints[0, 3, 2] == 0 and np.isnan(result.keypoints[0, 3, 0])
    assert set(np.delete(result.keypoints[0, :, 2], 3).tolist()) == {1.0}
    assert any("visibility flag" in note for note in result.notes)
    assert read_keypoints(files.json(ground_truth(person)), image_size=(100, 200)).image_size.tolist() == [[100, 200]]
    assert read_keypoints(files.json(ground_truth(person, with_sizes=False))).image_size is None


def test_ground_truth_with_other_joint_names(files, person):
    document = ground_truth(person)
    document["categories"] = [{"keypoints": [f"joint {joint}" for joint in range(17)]}]
    with pytest.raises(InputError, match="joints that are not COCO's"):
        read_keypoints(files.json(document))
    assert read_keypoints(files.json(document), layout="h36m").source_layout == "h36m"


@pytest.mark.parametrize("form", ["id", "text", "file_name", "stem", "list"])
def test_annotations_give_sizes(files, entry, form):
    images = [{"id": 5, "file_name": "img_5.png", "width": 640, "height": 480}, {"id": 40, "width": 100, "height": 900}]
    images[1]["file_name"] = "img_40.png"
    name = {"id": 40, "text": "40", "file_name": "img_40.png", "stem": "img_40", "list": 40}[form]
    annotations = files.json(images if form == "list" else {"images": images}, "annotations.json")
    result = read_keypoints(files.json([entry(name)]), annotations=annotations)
    assert result.image_size.tolist() == [[100, 900]]
    assert (result.frame.tolist(), result.num_frames, result.num_empty_frames) == ([1], 2, 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 2, "width": 1, "height": 1}], "no entry for image id 1 in the images list"),
        ([{"id": 1}], "image id 1 has no width and height"),
        ([{"id": 1, "width": 0, "height": 480}], r"images\[0\]: the size must be positive"),
        ([{"id": 1, "width": -640, "height": 480}], "must be positive"),
        ([{"id": 1, "width": "640", "height": 480}], "must be two numbers"),
        ([{"id": 1, "width": True, "height": 480}], "must be two numbers"),
        ([{"id": 1, "width": 640}], "must be two numbers"),
        ([{"id": None, "width": 640, "height": 480}], "image_id must be an integer or a text"),
        ([7], "expected an object with id"),
        ([{"id": 1, "width": 1, "height": 2}, {"id": 1, "width": 2, "height": 2}], "stands twice"),
        ({"images": 3}, "expected a COCO images list"),
        ({"people": []}, "expected a COCO images list"),
    ],
)
def test_bad_annotations(files, entry, images, message):
    with pytest.raises(InputError, match=message):
        read_keypoints(files.json([entry(1)]), annotations=files.json(images, "annotations.json"))


def test_skeletons(files, entry):
    path = files.json([entry()])
    assert read_keypoints(path, skeleton=H36M_16).keypoints.shape == (1, 16, 3)
    with pytest.raises(InputError, match="does not convert to the 15 joints"):
        read_keypoints(path, skeleton=HUMANEVA_15)
    eyes = read_keypoints(path, head="mean_eyes")
    assert eyes.keypoints[0, 9].tolist() == [0, 100, np.float32(0.9)]


def test_halpe_by_count(files, entry):
    result = read_keypoints(files.json([entry(num_joints=26)]))
    assert result.source_layout == "halpe26" and "by its 26 joints" in result.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": [1.0] * 16}, r"entry 1: keypoints must be x, y, confidence for each joint, got 16 numbers"),
        ({"keypoints": [1.0] * 52}, "got 52 numbers"),
        (
            {"keypoints": [1.0] * 48},
            r"must be one of 17 \(coco\), 26 \(halpe26\), got 16|layout coco has 17 joints, got",
        ),
        ({"keypoints": []}, "layout coco has 17 joints, got 0"),
        ({"keypoints": [1.0] * 78}, "layout coco has 17 joints, got 26"),
        ({"keypoints": ["1"] * 51}, "expected numbers, got '1' at position 0"),
        ({"keypoints": [True] * 51}, "expected numbers, got True"),
        ({"keypoints": [[1, 2, 3]] * 17}, r"expected numbers, got \[1, 2, 3\]"),
        ({"keypoints": "51"}, "expected a list of numbers, got '51'"),
        ({"keypoints": [10**400] * 51}, "a number is too large"),
        ({"keypoints": [1e30] * 51}, r"entry 1 \(image id 2\), joint 0 \(Nose\)"),
        ({"keypoints": [float("inf"), 1, 1] * 17}, "is infinite"),
        ({"keypoints": [float("-inf"), 1, 1] * 17}, "is infinite"),
        ({"keypoints": [2e6, 1, 1] * 17}, r"is beyond 1e\+06"),
        ({"keypoints": [5, 1, 5000] * 17}, "third value must be a confidence, got 5000"),
        ({"keypoints": [5, 1, float("inf")] * 17}, "third value must be a confidence, got inf"),
        ({"image_id": None}, "image_id must be an integer or a text, got None"),
        ({"image_id": 1.5}, "image_id must be an integer or a text, got 1.5"),
        ({"image_id": True}, "image_id must be"),
        ({"image_id": [1]}, "image_id must be"),
        ({"score": "high"}, "score: expected numbers, got 'high'"),
        ({"score": True}, "score: expected numbers"),
        ({"score": 10**400}, "score: a number is too large"),
    ],
)
def test_bad_entries(files, entry, change, message):
    path = files.json([entry(1), {**entry(2), **change}])
    with pytest.raises(InputError, match=message) as caught:
        read_keypoints(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["image_id", "keypoints"])
def test_missing_key(files, entry, key):
    second = entry(2)
    del second[key]
    with pytest.raises(InputError, match=f"entry 1: {key} is not there"):
        read_keypoints(files.json([entry(1), second]))


def test_count_of_the_first_entry(files, entry):
    with pytest.raises(InputError, match=r"number of joints must be one of 17 \(coco\), 26 \(halpe26\), got 12"):
        read_keypoints(files.json([entry(num_joints=12)]))
    with pytest.raises(InputError, match="layout h36m_16 has 16 joints, got 17"):
        read_keypoints(files.json([entry()]), layout="h36m_16")


def test_huge_integers_and_deep_lists(files, entry):
    text = json.dumps([entry()]).replace('"score": 0.8', f'"score": {"9" * 5000}')
    with pytest.raises(InputError, match="not readable as JSON"):
        read_keypoints(files.bytes(text.encode()))
    with pytest.raises(InputError):
        read_keypoints(files.bytes(b"[" * 100_000))


@pytest.mark.parametrize("document", [[], {"annotations": [], "images": [{"id": 1}]}, {"annotations": []}])
def test_no_person(files, document):
    with pytest.raises(InputError, match="no person in any frame"):
        read_keypoints(files.json(document))


def test_boxes_only(files):
    with pytest.raises(InputError, match="no annotation has keypoints"):
        read_keypoints(files.json({"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(InputError, match="annotations must be a list"):
        read_keypoints(files.json({"annotations": {}}))


def test_all_missing(files, entry):
    with pytest.raises(InputError, match="all joints are missing in all 2 rows"):
        read_keypoints(files.json([entry(1, confidence=0), entry(2, confidence=None)]))


def test_only_toes_or_eyes(files, entry):
    document = [entry()]
    document[0]["keypoints"][9:] = [0] * 42
    with pytest.raises(InputError, match="no person has a joint"):
        read_keypoints(files.json(document))


def test_normalised_and_far_away(files, entry):
    document = [entry()]
    document[0]["keypoints"] = [
        value / 400 if index % 3 < 2 else value for index, value in enumerate(document[0]["keypoints"])
    ]
    with pytest.raises(InputError, match=r"coordinates must be pixels, but all lie in 0\.\.0\.45"):
        read_keypoints(files.json(document))
    far = files.json([entry(shift=7000)], "far.json")
    assert read_keypoints(far).keypoints[0, 1, 0] == 7120
    assert read_keypoints(far, image_size=(2500, 1000)).keypoints.shape == (1, 17, 3)
    with pytest.raises(
        InputError, match=r"joint 0 \(Nose\) is more than 3 image sizes outside the image: \(7000, 100\)"
    ):
        read_keypoints(far, image_size=(1000, 1000))
    with pytest.raises(InputError, match="image sizes outside"):
        read_keypoints(files.json([entry(shift=-7000)]), image_size=(600, 1000))

    # One joint alone spoils its person, not the file: the lifter says so.
    stray = [entry()]
    stray[0]["keypoints"][48] = 7000.0
    assert read_keypoints(files.json(stray), image_size=(1000, 1000)).keypoints[0, 3, 0] == 7000


def test_absurd_but_missing_is_missing(files, entry):
    document = [entry()]
    document[0]["keypoints"][48:51] = [float("inf"), 1e30, 0]
    assert read_keypoints(files.json(document)).keypoints[0, 3, 2] == 0
