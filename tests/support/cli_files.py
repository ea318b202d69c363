"""Files that ``diffupose lift`` reads, written to the current folder, and the command itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from diffupose.cli import main

SIZE = ("--image-size", "1000", "800")


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


def good():
    return write(coco((1, 0, 0.9)))


def npy(array, name="kps.npy"):
    np.save(name, array)
    return name


def coco_with(**changes):
    return write([coco((1, 0, 0.9))[0] | changes])


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
