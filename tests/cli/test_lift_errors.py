"""``diffupose lift``: one clear line for everything that is wrong with its options and files."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from support.cli_files import SIZE, coco, coco_person, coco_with, good, lift, npy, refused, write
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import people, write_tiny_lifter

import diffupose.lifting.lifter
from diffupose.cli import main


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
    import diffupose.lifting.plot

    def fail(*_, **__):
        raise ValueError("poses_3d and hypotheses must hold a finite pose to draw")

    monkeypatch.setattr(diffupose.lifting.plot, "plot_poses", fail)
    arguments = [good(), "--model", model, "--out", "poses.npz", "--plot", "out.png", *SIZE]
    refused(capsys, arguments, "finite pose")


def test_an_interrupt_leaves_nothing(model, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffupose.lifting.lifter.Chunks, "run", interrupt)
    file = good()
    before = sorted(os.listdir())
    assert main(["lift", file, "--model", str(model), "--out", "poses.npz", *SIZE]) == 130
    assert capsys.readouterr().err == "diffupose: interrupted\n"
    assert sorted(os.listdir()) == before
