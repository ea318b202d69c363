"""The bundled checkpoint: its hypotheses differ, project onto the keypoints, and beat the nearest training pose."""

from __future__ import annotations

import itertools
import os
from importlib import resources

import pytest
import torch
from support.sweeps import mostly_slow

from diffupose import Lifter
from diffupose.camera import person_box, project
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, load_mocap
from diffupose.evaluation.cells import RIGS, PoseBank, choose_poses, make_cell
from diffupose.lifting.aggregation import reprojection_error
from diffupose.metrics import (
    DEFAULT_LEVELS,
    coverage,
    dispersion,
    energy_score,
    expected_calibration_error,
    mpjpe,
    oracle_best_of_hypotheses,
)

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


def stretched(hypotheses, factor):
    mean = hypotheses.mean(dim=1, keepdim=True)
    return mean + factor * (hypotheses - mean)


def calibration(hypotheses, cell, scale):
    """Return the coverage of the 50 % and 90 % regions, mean over joints without the root, and the ECE."""
    reached = coverage(hypotheses, cell.views.poses_3d, scale=scale)  # [L, J]
    half, most = (list(DEFAULT_LEVELS).index(level) for level in (0.5, 0.9))
    ece, _ = expected_calibration_error(reached)
    return float(reached[half, 1:].mean()), float(reached[most, 1:].mean()), float(ece)


# Where motion capture to validate on is at hand: noisy cells of 1,000 poses. Everywhere: the bundled person, who is
# easier than most.
VALIDATION = os.environ.get("DIFFUPOSE_MOCAP_VAL")


@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("count", mostly_slow([10, 50]))
@pytest.mark.parametrize(("source", "tolerance"), [("sample", 0.15), ("validation", 0.05)])
def test_covariance_is_calibrated(lifter, rig, count, source, tolerance):
    """The regions hold what they promise on noisy keypoints; with half or twice the spread they would not."""
    if source == "validation" and not VALIDATION:
        pytest.skip("DIFFUPOSE_MOCAP_VAL names no mocap_val.npz")
    people = sample_poses(include=SAMPLE_SUBJECTS) if source == "sample" else load_mocap(VALIDATION)
    cell = make_cell(choose_poses(people, NUM_POSES if source == "sample" else 1000, seed=0), rig, True)
    result = lifter(cell.keypoints, image_size=cell.views.image_size, num_hypotheses=count, flip=False)

    def calibrated(factor):
        half, most, ece = calibration(stretched(result.hypotheses, factor), cell, lifter.covariance_scale)
        print(f"{cell.name}, N = {count}, spread x {factor}: 50 % {half:.3f}, 90 % {most:.3f}, ECE {ece:.3f}")
        return abs(half - 0.5) <= tolerance and abs(most - 0.9) <= tolerance and ece <= tolerance

    assert calibrated(1.0)
    assert not calibrated(0.5)
    assert not calibrated(2.0)


def test_more_hypotheses_never_raise_the_oracle_best(cell_and_result):
    """Those of a smaller N are the first of a larger one: the best of more is never worse, for any pose."""
    cell, result = cell_and_result("wild", True)
    few = lift_more(cell, 3)
    assert torch.allclose(few, result.hypotheses[:, :3], atol=1e-5)
    best = [oracle_best_of_hypotheses(result.hypotheses[:, :n], cell.views.poses_3d) for n in range(1, 11)]
    assert all(bool((more <= less).all()) for less, more in itertools.pairwise(best))
    assert float(best[-1].mean()) < 0.95 * float(best[0].mean())


def lift_more(cell, count, **settings):
    lifter = Lifter.from_pretrained(device="cpu")
    options = {"image_size": cell.views.image_size, "num_hypotheses": count, "flip": False} | settings
    return lifter(cell.keypoints, **options).hypotheses


@pytest.mark.filterwarnings("ignore:the covariance was calibrated for num_inference_steps")
@pytest.mark.parametrize("rig", mostly_slow(RIGS))
def test_five_steps_are_as_good_as_a_hundred(rig):
    cell = make_cell(choose_poses(sample_poses(include=SAMPLE_SUBJECTS), 60, seed=1), rig, True)
    scores = {
        steps: float(energy_score(lift_more(cell, 10, num_inference_steps=steps), cell.views.poses_3d).mean())
        for steps in (5, 100)
    }
    print(f"{cell.name}: energy score {scores[5]:.2f} mm in 5 steps, {scores[100]:.2f} mm in 100")
    assert scores[5] <= 1.01 * scores[100]


def test_hypotheses_are_calibrated_before_any_factor(cell_and_result):
    """Errors are what the spread promises: not far from 1, here on a person who is easier than most."""
    for rig in RIGS:
        cell, result = cell_and_result(rig, True)
        value = float(dispersion(result.hypotheses, cell.views.poses_3d))
        print(f"{cell.name}: dispersion {value:.3f}")
        assert 0.85 <= value <= 1.2


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
