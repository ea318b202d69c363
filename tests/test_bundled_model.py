"""The bundled checkpoint: its hypotheses differ, project onto the keypoints, and beat the nearest training pose."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from diffupose import Lifter
from diffupose.aggregation import reprojection_error
from diffupose.camera import person_box, project
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, load_mocap
from diffupose.evaluation_cells import RIGS, PoseBank, choose_poses, make_cell
from diffupose.metrics import mpjpe

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_POSES = 200
WRISTS = [13, 16]


@pytest.fixture(scope="module")
def lifter():
    return Lifter.from_pretrained(device="cpu")


def sample_poses(**selection):
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as path:
        return load_mocap(path, **selection)


@pytest.fixture(scope="module")
def cell_and_result(lifter):
    """Makes a cell of people whom the model was not fitted on, and lifts it; each one once."""
    people, done = choose_poses(sample_poses(include=SAMPLE_SUBJECTS), NUM_POSES, seed=0), {}

    def lift(rig, noisy):
        if (rig, noisy) not in done:
            cell = make_cell(people, rig, noisy)
            result = lifter(cell.keypoints, image_size=cell.views.image_size, num_hypotheses=10, flip=False)
            done[rig, noisy] = cell, result
        return done[rig, noisy]

    return lift


def test_metadata(lifter):
    assert lifter.skeleton.name == "h36m_17"
    assert lifter.config.denoiser.condition_channels == 3  # it sees which joints are missing
    assert lifter.config.input_normalization == "person"
    assert lifter.config.sampling.num_hypotheses == 10


@pytest.mark.parametrize("rig", RIGS)
def test_hypotheses_differ_in_depth(cell_and_result, rig):
    """The depth of the wrists is what one view leaves open: some centimetres, not nothing and not the whole arm."""
    _, result = cell_and_result(rig, False)
    deviation = 1000.0 * result.hypotheses[:, :, WRISTS, 2].std(dim=1).mean()
    across = 1000.0 * result.hypotheses[:, :, WRISTS, :2].std(dim=1).mean()
    print(f"{rig}: wrists' depth {deviation:.1f} mm, across {across:.1f} mm")
    assert 15.0 < deviation < 80.0
    assert across < deviation


@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
@pytest.mark.parametrize("rig", RIGS)
def test_beats_the_nearest_training_pose(cell_and_result, rig, noisy):
    cell, result = cell_and_result(rig, noisy)
    nearest = PoseBank(sample_poses(exclude=SAMPLE_SUBJECTS)).nearest_pose(cell)
    error = float(mpjpe(result.mean, cell.views.poses_3d).mean())
    baseline = float(mpjpe(nearest, cell.views.poses_3d).mean())
    print(f"{cell.name}: mean of 10 {error:.1f} mm, nearest 2D pose {baseline:.1f} mm")
    assert error < 0.6 * baseline


@pytest.mark.parametrize("rig", RIGS)
def test_hypotheses_project_onto_the_keypoints(lifter, rig):
    """Placed by linear least squares, hypotheses lie within 3 % of the box's longer side of exact keypoints."""
    people = choose_poses(sample_poses(include=SAMPLE_SUBJECTS), 60, seed=0)
    views = make_cell(people, rig, False).views
    keypoints = project(views.poses_3d + views.root[:, None], views.focal, views.center)  # without lens distortion
    intrinsics = torch.zeros(len(keypoints), 3, 3)
    intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2], intrinsics[:, 2, 2] = views.focal, views.center, 1.0
    result = lifter(keypoints, intrinsics=intrinsics, num_hypotheses=10, flip=False)
    present = torch.ones(keypoints.shape[:2])
    error, translation = reprojection_error(result.hypotheses, keypoints, present, intrinsics)
    _, half = person_box(keypoints, present.bool())
    share = float((error / (2.0 * half)).mean())
    root = float((translation - views.root[:, None]).norm(dim=-1).mean())
    print(f"{rig}: reprojection error {100 * share:.2f} % of the box, root {root:.2f} m off")
    assert share < 0.03
    assert torch.equal(translation, result.translation)
