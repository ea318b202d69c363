"""``diffupose lift``: files in, files out, and one clear line for everything that is wrong with them."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import people, write_tiny_lifter

import diffupose.lifter
from diffupose.cli import main
from diffupose.ops import PackedDenoiser
from diffupose.skeleton import H36M_17
from diffupose.testing import requires_cpp

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    *("poses_3d", "hypotheses", "covariance", "keypoints_2d", "confidence", "frame", "person", "image_id"),
    *("joint_names", "edges", "units", "coordinate_frame", "meta"),
}
SIZE = ("--image-size", "1000", "800")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_lifter(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return write_tiny_lifter(tmp_path_factory.mktemp("model") / "image.safetensors", "image")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coco_person(seed=0, confidence=0.9):
    """Return one entry's keypoints: 17 COCO joints of somebody upright."""
    generator = random.Random(seed)
    y = [150, 145, 145, 150, 150, 200, 200, 260, 260, 310, 310, 320, 320, 410, 410, 500, 500]
    side = [0, 8, -8, 15, -15, 40, -40, 55, -55, 60, -60, 28, -28, 30, -30, 32, -32]
    return [
        value
        for dx, height in zip(side, y, strict=True)
        for value in (500 + dx + generator.uniform(-9, 9), height + generator.uniform(-9, 9), confidence)
    ]


def coco(*people_by_image):
    return [
        {"image_id": image, "category_id": 1, "keypoints": coco_person(seed), "score": score}
        for image, seed, score in people_by_image
    ]


def write(document, name="kps.json"):
    Path(name).write_text(document if isinstance(document, str) else json.dumps(document))
    return name


def lift(*arguments, model, out="poses.npz"):
    assert main(["lift", *map(str, arguments), "--model", str(model), "--out", out]) == 0
    if out.endswith(".json"):
        return json.loads(Path(out).read_text())
    with np.load(out, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


# --- what works -----------------------------------------------------------------------------------------------------


def test_bundled_example_with_the_bundled_model(capsys):
    """The command of the README, with no option that is not needed."""
    with resources.as_file(resources.files("diffupose") / "examples") as examples:
        arguments = [str(examples / "keypoints.json"), "--annotations", str(examples / "images.json")]
        status = main(["lift", *arguments, "--num-hypotheses", "10", "--out", "poses.npz", "--plot", "out.png"])
    assert status == 0
    with np.load("poses.npz", allow_pickle=False) as data:
        assert set(data.files) == KEYS
        rows = len(data["frame"])
        assert rows >= 2
        assert data["hypotheses"].shape == (rows, 10, 17, 3)
        assert np.isfinite(data["hypotheses"]).all()
        # Somebody of human size, head up: y points down.
        height = data["poses_3d"][:, [3, 6], 1].max(axis=1) - data["poses_3d"][:, 10, 1]
        assert (height > 0.7).all() and (height < 2.2).all()
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["out.png", "poses.npz"]
    printed = capsys.readouterr().out
    for line in ("file:", "layout:", "people:", "threshold:", "image size:", "focal:", "model:", "lifted:"):
        assert f"{line} " in printed


def test_prints_what_it_assumed(model, capsys):
    document = coco((1, 0, 0.9), (1, 1, 0.8), (12, 2, 0.9))
    document[2]["keypoints"][2] = 0.1  # the nose of the third
    images = [{"id": number, "width": 1000, "height": 800} for number in (1, 12, 30)]
    lift(write(document), "--annotations", write({"images": images}, "images.json"), "--seed", 9, model=model)
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("note"))
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["file"] == "kps.json (coco_results)"
    assert facts["layout"] == "coco, 17 joints -> 17 joints (h36m_17)"
    assert facts["people"] == "3 in frames: 3 (1 without a person)"
    assert facts["threshold"] == "0.3 (1 joints below it are missing)"
    assert facts["image size"] == "1000 x 800"
    assert facts["focal"] == "1150 px (assumed: 1.15 x the longer image side)"
    assert facts["model"] == "parallel, ddim in 3 steps, seed 9"
    assert facts["lifted"] == "3 people x 5 hypotheses, metres, camera frame, root-relative"
    assert facts["poses"] == "poses.npz"


def test_quiet_prints_nothing(model, capsys):
    lift(write(coco((1, 0, 0.9))), *SIZE, "--quiet", model=model)
    assert capsys.readouterr() == ("", "")


def test_openpose_file_and_folder(model):
    person = people(1)[0]
    body25 = np.zeros((25, 3))
    # OpenPose: nose, neck, right arm, left arm, mid-hip, right leg, left leg, eyes, ears.
    body25[:15, :2] = person[[9, 8, 14, 15, 16, 11, 12, 13, 0, 1, 2, 3, 4, 5, 6]]
    body25[15:19, :2] = person[10] + np.array([[-6, 10], [6, 10], [-12, 14], [12, 14]])
    body25[:19, 2] = 0.8
    document = {"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": body25.ravel().tolist()}]}
    single = lift(write(document, "clip_000000000007_keypoints.json"), *SIZE, model=model)
    assert single["poses_3d"].shape == (1, 17, 3)
    Path("openpose").mkdir()
    write(document, "openpose/clip_000000000007_keypoints.json")
    write({"version": 1.3, "people": []}, "openpose/clip_000000000008_keypoints.json")
    write(document, "openpose/clip_000000000010_keypoints.json")
    folder = lift("openpose", *SIZE, model=model, out="folder.npz")
    assert folder["frame"].tolist() == [0, 2]  # the empty one is a frame, too
    assert np.abs(folder["hypotheses"][0] - single["hypotheses"][0]).max() < 1e-5
    assert np.abs(folder["hypotheses"][1] - single["hypotheses"][0]).max() > 1e-3  # noise of its own


@pytest.mark.parametrize("name", ["kps.npy", "kps.npz"])
def test_arrays(model, name, capsys):
    poses = people(2).astype(np.float32)
    np.save(name, poses) if name.endswith("npy") else np.savez(name, keypoints=poses)
    written = lift(name, *SIZE, model=model)
    assert np.array_equal(written["keypoints_2d"], poses)
    assert "note:       layout h36m is assumed for an array of 17 joints" in capsys.readouterr().out


def test_json_output_equals_npz(model):
    file = write(coco((1, 0, 0.9), (2, 1, 0.9)))
    arrays = lift(file, *SIZE, model=model)
    content = lift(file, *SIZE, model=model, out="poses.json")
    assert set(content) == set(arrays) == KEYS
    for name in ("poses_3d", "hypotheses", "covariance", "keypoints_2d"):
        assert np.array_equal(np.array(content[name], dtype=np.float32), arrays[name], equal_nan=True)
    assert content["image_id"] == arrays["image_id"].tolist() == ["1", "2"]
    assert content["meta"] == json.loads(str(arrays["meta"]))
    assert (content["meta"]["source_format"], content["meta"]["source_layout"]) == ("coco_results", "coco")


def by_person(arrays):
    """Return the hypotheses by image and 2D keypoints, whatever the order of the rows."""
    keys = zip(arrays["image_id"].tolist(), arrays["keypoints_2d"].tolist(), strict=True)
    return {(image, str(points)): arrays["hypotheses"][row] for row, (image, points) in enumerate(keys)}


def test_the_order_of_the_file_does_not_matter(model, monkeypatch):
    document = coco(("a", 0, 0.9), ("a", 1, 0.8), ("a", 2, 0.9), ("b", 0, 0.7), ("10", 3, 0.5), ("9", 0, 0.9))
    first = lift(write(document), *SIZE, model=model)
    shuffled = document[::-1]
    random.Random(4).shuffle(shuffled)
    monkeypatch.setattr(diffupose.lifter, "_CHUNK_BYTES", 4 * 17 * 32 * 4 * 8)
    second = lift(write(shuffled), *SIZE, model=model, out="other.npz")
    assert np.array_equal(first["image_id"], second["image_id"])
    assert np.array_equal(first["keypoints_2d"], second["keypoints_2d"])
    assert np.abs(first["hypotheses"] - second["hypotheses"]).max() < 1e-5
    # Nor do the other people: each image alone gives the same.
    everybody, alone = by_person(first), {}
    for image in ("a", "b", "10", "9"):
        part = [entry for entry in document if entry["image_id"] == image]
        alone |= by_person(lift(write(part), *SIZE, model=model))
    assert everybody.keys() == alone.keys()
    assert max(np.abs(everybody[key] - alone[key]).max() for key in alone) < 1e-5
    # The same keypoints in another image have noise of their own, and another seed has other noise.
    same = [poses for (_, points), poses in everybody.items() if points == str(first["keypoints_2d"][0].tolist())]
    assert len(same) >= 2 and np.abs(same[0] - same[1]).max() > 1e-3
    other = lift(write(document), *SIZE, "--seed", "1", model=model)
    assert np.abs(first["hypotheses"] - other["hypotheses"]).max() > 1e-3


def test_intrinsics(model):
    written = lift(write(coco((1, 0, 0.9))), "--intrinsics", 900, 910, 480, 400, model=model)  # no image size needed
    assert set(written) == {*KEYS, "translation"}
    assert written["translation"].shape == (1, 5, 3)
    assert json.loads(str(written["meta"]))["focal_length_px"] == [900.0]


def test_options_reach_the_lifter(model):
    options = ("--num-hypotheses", 3, "--num-inference-steps", 4, "--sampler", "ddim", "--eta", 0.5, "--flip")
    written = lift(
        write(coco((1, 0, 0.9))),
        *SIZE,
        *options,
        "--aggregation",
        "medoid",
        "--seed",
        5,
        "--assumed-focal",
        2,
        model=model,
    )
    assert written["hypotheses"].shape == (1, 6, 17, 3)
    assert (np.abs(written["hypotheses"][0] - written["poses_3d"][0]).max(axis=(1, 2)) == 0).any()
    meta = json.loads(str(written["meta"]))
    expected = {"num_hypotheses": 3, "num_inference_steps": 4, "sampler": "ddim", "eta": 0.5, "flip": True, "seed": 5}
    assert meta | expected | {"aggregation": "medoid", "focal_length_px": [2000.0]} == meta


@pytest.mark.parametrize("joints", [16, 17])
def test_released_checkpoint_needs_no_options(joints, capsys):
    write_released_checkpoint("best_model.pt", 32, joints, seed=2)
    written = lift(write(coco((1, 0, 0.9))), *SIZE, model="best_model.pt")
    assert written["hypotheses"].shape == (1, 20, joints, 3)
    assert len(written["joint_names"]) == joints and len(written["edges"]) == joints - 1
    meta = json.loads(str(written["meta"]))
    assert (meta["sampler"], meta["num_inference_steps"], meta["flip"]) == ("ddpm", 100, True)
    assert meta["input_normalization"] == "image" and meta["focal_length_px"] is None
    assert f"-> {joints} joints" in (printed := capsys.readouterr().out)
    assert "focal:      none (this model needs none)" in printed


# --- incomplete people ----------------------------------------------------------------------------------------------


def test_people_with_too_few_joints_are_counted_and_nan(model, capsys):
    poses = people(3)
    poses[1, :10] = np.nan
    np.save("kps.npy", poses)
    written = lift("kps.npy", *SIZE, model=model)
    assert np.isnan(written["poses_3d"]).all(axis=(1, 2)).tolist() == [False, True, False]
    printed = capsys.readouterr().out
    assert "skipped:    1 of 3 people" in printed and "lifted:     2 people" in printed
    content = lift("kps.npy", *SIZE, model=model, out="poses.json")
    assert content["poses_3d"][1] == [[None] * 3] * 17


def test_people_with_absurd_joints_are_counted_and_nan(model, capsys):
    """One foot far outside of the image would shrink all other joints to a point: nobody's pose."""
    document = coco(*((number, number, 0.9) for number in range(5)))
    document[1]["keypoints"][3 * 16] = 15000.0  # an ankle
    document[2]["keypoints"][3 * 12] = 15000.0  # a hip, from which the middle of the hips and the spine follow
    document[3]["keypoints"][3 * 6] = 15000.0  # a shoulder, from which thorax, neck, head and spine follow
    document[4]["keypoints"][:] = [value / 1000 if value > 1 else value for value in document[4]["keypoints"]]
    file = write(document)
    for option in (SIZE, ("--intrinsics", 900, 910, 480, 400)):
        written = lift(file, *option, model=model)
        assert np.isnan(written["poses_3d"]).all(axis=(1, 2)).tolist() == [False, True, True, True, True]
        printed = capsys.readouterr().out
        assert (
            "skipped:    4 of 5 people (NaN rows): 3 with a joint too far from all others, "
            "1 with all joints within ±1.5: normalised already"
        ) in printed
    alone = [write(document[1:2], "alone.json"), "--model", model, *SIZE]
    refused(capsys, alone, "no person of alone.json can be lifted: 1 with a joint too far from all others")


def test_frames_without_a_person_are_no_error(model):
    images = {"images": [{"id": number, "width": 1000, "height": 800} for number in (1, 2, 3)]}
    file = write(coco((1, 0, 0.9), (3, 1, 0.9)))
    written = lift(file, "--annotations", write(images, "images.json"), model=model)
    assert written["frame"].tolist() == [0, 2]


def test_filled_joints_are_said_in_one_line(image_model, capsys):
    poses = people(2)
    poses[:, [13, 16]] = np.nan
    np.save("kps.npy", poses)
    lift("kps.npy", *SIZE, "--quiet", model=image_model)
    captured = capsys.readouterr()
    assert captured.err == (
        "diffupose: warning: 4 missing joints are filled by the mean pose: "
        "this model cannot know that they are missing\n"
    )


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(capsys, arguments, *expected):
    """Run ``lift`` and check that it ends in one line that says why, and leaves the folder as it was."""
    before = sorted(Path().rglob("*"))
    try:
        status = main(["lift", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2, captured
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(("diffupose: error: ", "diffupose lift: error: "))
    for text in expected:
        assert text in lines[0], lines[0]
    assert "Error(" not in lines[0]
    assert sorted(Path().rglob("*")) == before
    assert "poses:" not in captured.out


def good():
    return write(coco((1, 0, 0.9)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-hypotheses", "0"], ["--num-hypotheses must be a whole number of at least 1, got 0"]),
        (["--num-hypotheses", "-1"], ["--num-hypotheses must be a whole number of at least 1, got -1"]),
        (["--num-hypotheses", "1.5"], ["--num-hypotheses", "1.5"]),
        (["--num-hypotheses", "many"], ["--num-hypotheses", "many"]),
        (["--num-hypotheses", "999999999999"], ["--num-hypotheses must be at most"]),
        (["--num-inference-steps", "0"], ["--num-inference-steps", "0"]),
        (["--num-inference-steps", "100000"], ["--num-inference-steps must be an integer between 1 and 50"]),
        (["--eta", "2"], ["--eta", "2"]),
        (["--eta", "nan"], ["--eta", "nan"]),
        (["--sampler", "ddpm", "--eta", "0.5"], ["--eta"]),
        (["--sampler", "euler"], ["--sampler", "euler"]),
        (["--aggregation", "median"], ["--aggregation", "median"]),
        (["--seed", str(2**64)], ["--seed must be an integer of 64 bits"]),
        (["--seed", str(-(2**63) - 1)], ["--seed must be"]),
        (["--seed", "0.5"], ["--seed", "0.5"]),
        (["--assumed-focal", "0"], ["--assumed-focal must be", "0.0"]),
        (["--assumed-focal", "nan"], ["--assumed-focal must be"]),
        (["--assumed-focal", "-1"], ["--assumed-focal must be"]),
        (["--image-size", "0", "0"], ["--image-size must be positive"]),
        (["--image-size", "nan", "800"], ["--image-size must be positive"]),
        (["--image-size", "1000", "inf"], ["--image-size must be positive"]),
        (["--image-size", "-1000", "800"], ["--image-size must be positive"]),
        (["--image-size", "1e9", "1e9"], ["--image-size must hold positive pixels"]),
        (["--image-size", "10", "8"], ["kps.json", "image sizes outside the image"]),
        (["--image-size", "1000"], ["--image-size"]),
        (["--intrinsics", "0", "0", "0", "0"], ["--intrinsics must be"]),
        (["--intrinsics", "nan", "900", "500", "400"], ["--intrinsics must be"]),
        (["--intrinsics", "1e300", "1e300", "500", "400"], ["--intrinsics must be"]),
        (["--intrinsics", "900", "900", "1e18", "400"], ["--intrinsics must be"]),
        (["--intrinsics", "1.15", "1.15", "0.5", "0.5"], ["--intrinsics must be in pixels and fit the keypoints"]),
        (["--intrinsics", "900", "900"], ["--intrinsics"]),
        (["--score-threshold", "1.5"], ["--score-threshold must be a number in 0..1"]),
        (["--score-threshold", "nan"], ["--score-threshold must be"]),
        (["--score-threshold", "0.95"], ["all joints are below the score threshold 0.95"]),
        (["--layout", "openpose_body25"], ["layout", "17"]),
        (["--layout", "nonsense"], ["--layout", "nonsense"]),
        (["--head", "none"], ["--head", "none"]),
        (["--device", "abacus"], ["--device must be auto or one that PyTorch can use here, got 'abacus'"]),
        (["--device", "meta"], ["--device must be auto or one that holds numbers, got 'meta'"]),
        (["--annotations", "nowhere.json", "--image-size-off"], ["--image-size-off"]),
        (["--plot", "picture.bmp"], ["--plot must end in .png, .pdf, .svg, got 'picture.bmp'"]),
        (["--plot", "nowhere/picture.png"], ["--plot: the folder 'nowhere' does not exist"]),
        (["--out", "poses.txt"], ["--out must end in .npz, .json, got 'poses.txt'"]),
        (["--out", "poses"], ["--out must end in"]),
        (["--out", ""], ["--out must end in"]),
        (["--out", "nowhere/poses.npz"], ["--out: the folder 'nowhere' does not exist"]),
        (["--out", "folder.npz"], ["--out: 'folder.npz' is a folder"]),
        (["--out", "kps.json/poses.npz"], ["--out: the folder 'kps.json' does not exist"]),
        (["--out", "poses.npz/"], ["--out: 'poses.npz/' is the name of a folder"]),
        (["--out", "kps.json"], ["--out must not be the input, got 'kps.json'"]),
        (["--surprise"], ["--surprise"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_options(model, capsys, options, expected):
    Path("folder.npz").mkdir()
    size = () if "--image-size" in options else SIZE
    refused(capsys, [good(), "--model", model, "--out", "poses.npz", *size, *options], *expected)


def test_outputs_that_are_needed(model, capsys):
    """No file of the user's is overwritten that the command reads, under whatever name."""
    file, images = good(), write({"images": [{"id": 1, "width": 1000, "height": 800}]}, "images.json")
    os.link(file, "hard.json")
    os.symlink("poses.npz", "out.png")
    os.symlink(model, "model.json")
    for name in ("kps.npz", "kps.png"):
        os.symlink(file, name)
    sized = [file, "--model", model, "--annotations", images]
    refused(capsys, [*sized, "--out", "hard.json"], "--out must not be the input, got 'hard.json'")
    refused(capsys, [*sized, "--out", "kps.npz"], "--out must not be the input")
    refused(capsys, [*sized, "--out", "./images.json"], "--out must not be --annotations, got './images.json'")
    refused(capsys, [*sized, "--out", "model.json"], "--out must not be --model")
    refused(capsys, [*sized, "--out", "poses.npz", "--plot", "kps.png"], "--plot must not be the input")
    refused(capsys, [*sized, "--out", "poses.npz", "--plot", "out.png"], "--plot must not be --out")
    Path("openpose").mkdir()
    write({"people": []}, "openpose/a_0_keypoints.json")
    inside = ["openpose", "--model", model, *SIZE, "--out", "openpose/a_0_keypoints.json"]
    refused(capsys, inside, "--out must not be one of the input's files, got 'openpose/a_0_keypoints.json'")
    lift(file, *SIZE, model=model, out="other.npz")
    lift(file, *SIZE, model=model, out="other.npz")  # what is not needed may be replaced


def npy(array, name="kps.npy"):
    np.save(name, array)
    return name


def coco_with(**changes):
    return write([coco((1, 0, 0.9))[0] | changes])


def coco_value(value):
    keypoints = coco_person()
    keypoints[3 * 5] = value
    return coco_with(keypoints=keypoints)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "nowhere.json", ["nowhere.json"]),
        (lambda: write(""), ["kps.json", "empty"]),
        (lambda: write("[{"), ["kps.json", "broken JSON at line 1"]),
        (lambda: write(json.dumps(coco((1, 0, 0.9)))[:-40]), ["kps.json", "broken JSON"]),
        (lambda: write("[]"), ["kps.json", "no person"]),
        (lambda: write('{"people": []}', "a_000_keypoints.json"), ["a_000_keypoints.json", "no person"]),
        (lambda: write({"hello": 1}), ["kps.json", "not a keypoint file"]),
        (lambda: write("5"), ["kps.json", "not a keypoint file"]),
        (lambda: write("null"), ["kps.json", "not a keypoint file"]),
        (lambda: write("[" * 100000), ["kps.json"]),
        (lambda: coco_with(keypoints=coco_person()[:-3]), ["kps.json", "16"]),
        (lambda: coco_with(keypoints="abc"), ["kps.json", "list of numbers"]),
        (lambda: coco_with(keypoints=[0.0] * 51), ["kps.json", "all joints are missing"]),
        (lambda: coco_with(keypoints=[value / 1000 for value in coco_person()]), ["kps.json", "normalised already"]),
        (lambda: coco_with(keypoints=[math.nan] * 51), ["kps.json", "all joints are missing"]),
        (lambda: coco_value(math.inf), ["kps.json", "infinite"]),
        (lambda: coco_value(1e12), ["kps.json", "beyond"]),
        (lambda: coco_value(1e400), ["kps.json", "infinite"]),
        (lambda: coco_value(10**400), ["kps.json", "too large"]),
        (lambda: npy(people(1)[:, :12]), ["kps.npy", "12"]),
        (lambda: npy(people(1)[:, :15]), ["kps.npy: layout humaneva (15 joints) does not convert"]),
        (lambda: npy(np.full((2, 17, 2), np.nan)), ["kps.npy", "all joints are missing"]),
        (lambda: npy(np.zeros((0, 17, 2))), ["kps.npy", "no person"]),
        (lambda: npy(np.zeros((2, 17, 2))), ["kps.npy", "all joints are missing"]),
        (lambda: npy(people(1) / 1000), ["kps.npy", "normalised already"]),
        (lambda: npy(np.full((1, 17, 2), 300.0)), ["kps.npy", "1 with all joints at one point"]),
        (
            lambda: npy(np.where(np.arange(17)[:, None] < 10, np.nan, people(1))),
            ["kps.npy", "1 with more than half of the joints missing"],
        ),
        (lambda: npy(np.array([{"a": 1}], dtype=object)), ["kps.npy", "pickled"]),
        (lambda: npy(np.zeros((2, 3, 17, 2))), ["kps.npy", "shape"]),
        (lambda: write("\x93NUMPY broken", "kps.npy"), ["kps.npy"]),
        (lambda: "empty", ["empty"]),
        (lambda: "", ["no *_keypoints.json file"]),
    ],
)
def test_bad_files(model, capsys, make, expected):
    Path("empty").mkdir()
    file = make()
    refused(capsys, [file, "--model", model, "--out", "poses.npz", "--plot", "out.png", *SIZE], *expected)


def test_image_size_is_asked_for_where_it_is_needed(model, image_model, capsys):
    needed = "the image size is needed: give --image-size W H or --annotations FILE"
    refused(capsys, [good(), "--model", model], needed)
    refused(capsys, [good(), "--model", image_model, "--intrinsics", 900, 900, 500, 400], needed)
    both = [good(), "--model", model, *SIZE, "--annotations", write({"images": []}, "images.json")]
    refused(capsys, both, "image_size or annotations, not both")
    refused(capsys, [good(), "--model", model, "--annotations", "images.json"], "images.json", "image id 1")


def cut(name):
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])
    return name


def cut_ours():
    return cut(write_tiny_lifter("half.safetensors"))


def cut_released():
    write_released_checkpoint("half.pt", 32, 17, seed=0)
    return cut("half.pt")


def other_pickle():
    Path("other.pkl").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return "other.pkl"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "nonsense", ["--model must be a file or a bundled name (mocap), got 'nonsense'"]),
        (lambda: "nowhere/best_model.pt", ["nowhere/best_model.pt"]),
        (lambda: "nowhere.safetensors", ["nowhere.safetensors"]),
        (lambda: ".", ["'.'"]),
        (cut_ours, ["half.safetensors", "is damaged"]),
        (cut_released, ["half.pt", "damaged"]),
        (other_pickle, ["other.pkl", "neither a diffupose checkpoint"]),
        (lambda: write("hello, I am a text file"), ["kps.json", "neither a diffupose checkpoint"]),
        (lambda: write_tiny_lifter("eva.safetensors", "person", "humaneva_15"), ["does not convert to the 15 joints"]),
    ],
)
def test_bad_models(capsys, make, expected):
    name = make()
    file = write(coco((1, 0, 0.9)), "good.json")
    refused(capsys, [file, "--model", name, "--out", "poses.npz", *SIZE], *expected)


def test_a_folder_that_may_not_be_written_to(model, capsys, monkeypatch):
    file = good()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    expected = "--out: the folder '.' may not be written to"
    refused(capsys, [file, "--model", model, "--out", "poses.npz", *SIZE], expected)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs /sys, which takes no files even from root")
def test_a_folder_that_takes_no_files(model, capsys):
    refused(capsys, [good(), "--model", model, "--out", "/sys/poses.npz", *SIZE], "--out: the folder '/sys'")


@pytest.mark.parametrize("options", [[], ["--plot", "out.png"]])
def test_failure_of_the_last_step_leaves_nothing(model, capsys, monkeypatch, options):
    def fail(target, **arrays):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    arguments = [good(), "--model", model, "--out", "poses.npz", *SIZE, *options]
    refused(capsys, arguments, "No space left on device")


def test_failure_of_the_picture_leaves_nothing(model, capsys, monkeypatch):
    import diffupose.plot

    def fail(*_, **__):
        raise ValueError("poses_3d and hypotheses must hold a finite pose to draw")

    monkeypatch.setattr(diffupose.plot, "plot_poses", fail)
    arguments = [good(), "--model", model, "--out", "poses.npz", "--plot", "out.png", *SIZE]
    refused(capsys, arguments, "finite pose")


def test_an_interrupt_leaves_nothing(model, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffupose.lifter, "sample", interrupt)
    file = good()
    before = sorted(os.listdir())
    assert main(["lift", file, "--model", str(model), "--out", "poses.npz", *SIZE]) == 130
    assert capsys.readouterr().err == "diffupose: interrupted\n"
    assert sorted(os.listdir()) == before


def test_long_work_shows_a_progress_bar(model, capsys, monkeypatch):
    original = diffupose.lifter.sample

    def slow(*arguments, **options):
        time.sleep(0.6)
        return original(*arguments, **options)

    monkeypatch.setattr(diffupose.lifter, "sample", slow)
    monkeypatch.setattr(diffupose.lifter, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(PackedDenoiser, "max_hypotheses", 1)
    options = ("--num-hypotheses", 3, "--num-inference-steps", 1)
    lift(good(), *SIZE, *options, model=model)
    assert "3/3" in capsys.readouterr().err
    lift(good(), *SIZE, *options, "--quiet", model=model)
    assert capsys.readouterr().err == ""


@requires_cpp
def test_precision(model):
    exact = lift(good(), *SIZE, model=model)
    rough = lift(good(), *SIZE, "--precision", "bfloat16", model=model)
    assert 0 < np.abs(exact["hypotheses"] - rough["hypotheses"]).max() < 0.05
    assert json.loads(str(rough["meta"]))["precision"] == "bfloat16"


# --- the command itself, as people run it ---------------------------------------------------------------------------


def command(*arguments, stdout=subprocess.PIPE, **variables):
    root = Path(diffupose.__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)} | variables
    return subprocess.run(
        [sys.executable, "-m", "diffupose.cli", *map(str, arguments)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip


def test_as_a_process(model):
    done = command("lift", good(), "--model", model, *SIZE, "--out", "poses.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "poses:      poses.npz" in done.stdout
    assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)
    again = lift("kps.json", *SIZE, model=model, out="again.npz")
    assert np.abs(again["hypotheses"] - np.load("poses.npz")["hypotheses"]).max() < 1e-5


def test_messages_that_nobody_reads_do_not_cost_the_poses(model):
    """`| head -1`, and a full disk behind `>`."""
    arguments = ("lift", good(), "--model", model, *SIZE, "--out", "poses.npz")
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)
    os.remove("poses.npz")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = command(*arguments, stdout=full)
        warning = "diffupose: warning: standard output failed: No space left on device\n"
        assert (done.returncode, done.stderr) == (0, warning)
        assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)


def test_names_that_the_terminal_cannot_show(model):
    name = write(coco((1, 0, 0.9)), "käptn.json")
    done = command("lift", name, "--model", model, *SIZE, "--out", "pøses.npz", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "poses:      p\\xf8ses.npz" in done.stdout
    assert np.load("pøses.npz")["hypotheses"].shape == (1, 5, 17, 3)


def test_an_error_as_a_process(model):
    done = command("lift", write("[{"), "--model", model, *SIZE, "--out", "poses.npz")
    assert done.returncode == 2
    assert done.stderr.startswith("diffupose: error: kps.json: broken JSON") and done.stderr.count("\n") == 1
    assert os.listdir() == ["kps.json"]


def test_a_request_to_end_leaves_nothing_half_written(tmp_path, monkeypatch):
    """SIGTERM while a picture is drawn: neither file appears, nor a temporary one."""
    from diffupose.commands import lift

    def terminated(path, *_):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(lift, "_plot", terminated)
    monkeypatch.chdir(tmp_path)
    np.save("kps.npy", people(1))
    write_tiny_lifter("tiny.safetensors")
    arguments = ["lift", "kps.npy", "--model", "tiny.safetensors", *SIZE, "--out", "poses.npz", "--plot", "poses.png"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 128 + signal.SIGTERM
    assert sorted(os.listdir()) == ["kps.npy", "tiny.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("DIFFUPOSE_BACKEND", "torch")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    variables = next(line for line in printed.splitlines() if line.startswith("variables"))
    assert "DIFFUPOSE_BACKEND=torch" in variables.split()
    for name in ("diffupose", "python", "torch", "numpy", "safetensors"):
        assert any(line.split()[0] == name for line in printed.splitlines())
    states = [line.split(maxsplit=2) for line in printed.splitlines() if line.startswith("backend ")]
    assert {state[1] for state in states} == {"torch", "cpp", "cuda", "triton"}
    for _, name, state in states:
        assert state.startswith(("active: ", "inactive: ")), name
        assert len(state.split(": ", 1)[1]) > 5  # the reason


@pytest.mark.parametrize("arguments", [[], ["dance"], ["lift"], ["evaluate"]])
def test_incomplete_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-hypotheses", "0"], "--num-hypotheses must be at least 1, got 0"),
        (["--num-inference-steps", "100000"], "--num-inference-steps must be an integer"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--data", "plain.npy"], "plain.npy must be an npz of motion capture"),
        (["--data", "text.npz"], "text.npz"),
        (["--data", "other.npz"], "other.npz must hold 'positions'"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--data", "text.npz", "--json", "./text.npz"], "--json must not be --data, got './text.npz'"),
        (["--reference", "text.npz", "--json", "text.npz"], "--json must not be --reference"),
        (["--regressor", "text.npz", "--json", "text.npz"], "--json must not be --regressor"),
        (["--json", "nowhere/scores.json"], "--json: the folder 'nowhere' does not exist"),
        (["--device", "abacus"], "--device must be"),
        (["--seed", str(2**64)], "--seed must be between 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses(model, capsys, options, expected):
    np.save("plain.npy", np.zeros((3, 17, 3)))
    np.savez("other.npz", a=np.zeros(3))
    Path("text.npz").write_text("hello")
    before = sorted(os.listdir())
    assert main(["evaluate", "mocap", "--model", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_skeleton_of_the_output(model):
    written = lift(good(), *SIZE, model=model)
    assert tuple(written["joint_names"].tolist()) == H36M_17.joint_names
