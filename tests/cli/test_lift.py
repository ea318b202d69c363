"""``diffupose lift``: files in, files out."""

from __future__ import annotations

import json
import os
import random
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from support.cli_files import SIZE, coco, good, lift, refused, write
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import people

from diffupose.cli import main
from diffupose.engines.module_engines import ModuleEngine
from diffupose.ops import PackedDenoiser
from diffupose.skeleton import H36M_17
from diffupose.testing import requires_cpp

KEYS = {
    *("poses_3d", "hypotheses", "covariance", "keypoints_2d", "confidence", "frame", "person", "image_id"),
    *("joint_names", "edges", "units", "coordinate_frame", "meta"),
}


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
    for engine in (PackedDenoiser, ModuleEngine):
        monkeypatch.setattr(engine, "max_hypotheses", 4)
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


def test_long_work_shows_a_progress_bar(model, capsys, monkeypatch):
    for engine in (PackedDenoiser, ModuleEngine):

        def slow(*arguments, original=engine.sample):
            time.sleep(0.6)
            return original(*arguments)

        monkeypatch.setattr(engine, "sample", slow)
        monkeypatch.setattr(engine, "max_hypotheses", 1)
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


def test_skeleton_of_the_output(model):
    written = lift(good(), *SIZE, model=model)
    assert tuple(written["joint_names"].tolist()) == H36M_17.joint_names
