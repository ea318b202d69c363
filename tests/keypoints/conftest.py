"""Small keypoint files, written fresh for each test."""

import json
from pathlib import Path

import numpy as np
import pytest


class Files:
    """Writes files into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, document, name="keypoints.json"):
        return self.bytes(json.dumps(document).encode(), name)

    def bytes(self, content, name="keypoints.json"):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def npy(self, array, name="keypoints.npy"):
        np.save(self.folder / name, array)
        return self.folder / name

    def npz(self, name="keypoints.npz", **arrays):
        np.savez(self.folder / name, **arrays)
        return self.folder / name


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def person():
    """Makes the x, y, confidence list of a person whose joint j is at (10 j + shift, 100 + 5 j)."""

    def make(num_joints=17, shift=0.0, confidence=0.9):
        return [value for joint in range(num_joints) for value in (10.0 * joint + shift, 100.0 + 5 * joint, confidence)]

    return make


@pytest.fixture
def entry(person):
    """Makes one entry of a COCO results list."""

    def make(image_id=1, score=0.8, **options):
        return {"image_id": image_id, "category_id": 1, "keypoints": person(**options), "score": score}

    return make
