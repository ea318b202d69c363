"""The bundled example says what its poses say, joint by joint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffupose.keypoints import convert_keypoints, read_keypoints
from diffupose.skeleton import H36M_17

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "diffupose" / "examples"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_bundled_data", ROOT / "tools" / "make_bundled_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coco_joints_convert_back(tool):
    """Seen by a parallel projection, COCO's joints give Human3.6M's again; only the spine is made up."""
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(4, 17, 3, generator=generator)
    poses[:, 0] = (poses[:, 1] + poses[:, 4]) / 2
    poses[:, 8] = (poses[:, 11] + poses[:, 14]) / 2
    coco = tool.coco_joints(poses)[..., :2].numpy()
    back = convert_keypoints(np.concatenate((coco, np.ones((4, 17, 1))), axis=-1), "coco", H36M_17)
    known = [joint for joint in range(17) if joint != 7]
    np.testing.assert_allclose(back[:, known, :2], poses[:, known, :2].numpy(), atol=1e-5)


def test_example_is_labelled_and_readable():
    people = read_keypoints(EXAMPLES / "keypoints.json", annotations=EXAMPLES / "images.json")
    assert (len(people.keypoints), people.num_frames, people.num_empty_frames) == (3, 3, 1)
    images = json.loads((EXAMPLES / "images.json").read_text())
    assert images["info"]["description"].startswith("Synthetic")
    hips, shoulders = people.keypoints[:, [1, 4], 0], people.keypoints[:, [14, 11], 0]
    assert (shoulders[:, 1] > shoulders[:, 0]).all()  # everybody faces the camera: left is on the image's right
    assert np.isfinite(hips).all()
