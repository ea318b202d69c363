"""One pose out of many, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffupose.camera import project
from diffupose.lifting.aggregation import (
    best_by_reprojection,
    density_pick_of_hypotheses,
    mean_by_reprojection,
    medoid_of_hypotheses,
    refine_by_reprojection,
    reprojection_error,
)

K = torch.tensor([[1000.0, 0.0, 500.0], [0.0, 1100.0, 400.0], [0.0, 0.0, 1.0]])


def test_medoid_known_values():
    # One joint on a line at 0, 1, 2 and 10: sums of distances 13, 11, 11 + ... = 13, 11, 11, 27; the first wins.
    values = torch.tensor([0.0, 1.0, 2.0, 10.0])
    hypotheses = torch.zeros(1, 4, 1, 3)
    hypotheses[0, :, 0, 0] = values
    assert medoid_of_hypotheses(hypotheses)[0, 0].tolist() == [1.0, 0.0, 0.0]
    hypotheses[0, 1, 0, 0] = -5.0  # now -5, 0, 2, 10: sums 22, 17, 17 of which 0 comes first
    assert medoid_of_hypotheses(hypotheses)[0, 0].tolist() == [0.0, 0.0, 0.0]


def test_medoid_is_one_of_the_hypotheses_for_each_row():
    hypotheses = torch.randn(4, 6, 17, 3)
    hypotheses[:, 2] = hypotheses.mean(dim=1)  # nothing is nearer to all others than nearly their mean
    assert torch.equal(medoid_of_hypotheses(hypotheses), hypotheses[:, 2])
    assert torch.equal(medoid_of_hypotheses(hypotheses[:, :1]), hypotheses[:, 0])


@pytest.fixture
def scene():
    """A true pose among wrong ones, seen exactly."""
    hypotheses = 0.3 * torch.randn(3, 1, 17, 3) + 0.1 * torch.randn(3, 5, 17, 3)
    hypotheses -= hypotheses[:, :, :1]
    root = torch.tensor([[0.2, -0.1, 3.0], [0.0, 0.3, 5.0], [-1.0, 0.0, 4.0]])
    truth = torch.tensor([4, 0, 2])
    poses = hypotheses[torch.arange(3), truth]
    focal, center = K[[0, 1], [0, 1]], K[:2, 2]
    keypoints = project(poses + root[:, None], focal, center)
    return hypotheses, keypoints, truth, root


def test_reprojection_finds_the_true_pose(scene):
    hypotheses, keypoints, truth, root = scene
    confidence = torch.ones(3, 17)
    error, translation = reprojection_error(hypotheses, keypoints, confidence, K)
    rows = torch.arange(3)
    assert float(error[rows, truth].max()) < 0.01
    assert torch.allclose(translation[rows, truth], root, atol=1e-4)
    others = error[torch.nn.functional.one_hot(truth, 5) == 0]
    assert float(others.min()) > 5.0
    best = best_by_reprojection(hypotheses, keypoints, confidence, K.expand(3, 3, 3))
    assert torch.equal(best, hypotheses[rows, truth])


def test_missing_joints_have_no_weight(scene):
    hypotheses, keypoints, truth, _ = scene
    confidence = torch.ones(3, 17)
    confidence[:, 5:8] = 0.0
    keypoints[:, 5:8] = torch.nan
    error, translation = reprojection_error(hypotheses, keypoints, confidence, K)
    assert bool(torch.isfinite(error).all() and torch.isfinite(translation).all())
    assert torch.equal(error.argmin(dim=1), truth)


def test_confidence_is_a_weight(scene):
    hypotheses, keypoints, truth, _ = scene
    keypoints[:, 16, 0] += 400.0
    trusted, _ = reprojection_error(hypotheses, keypoints, torch.ones(3, 17), K)
    doubted = torch.ones(3, 17)
    doubted[:, 16] = 1e-3
    weighted, _ = reprojection_error(hypotheses, keypoints, doubted, K)
    rows = torch.arange(3)
    assert float(weighted[rows, truth].max()) < 0.1 * float(trusted[rows, truth].min())


def test_poses_behind_the_camera_lose_and_nan_rows_stay_nan(scene):
    hypotheses, keypoints, truth, _ = scene
    rows = torch.arange(3)
    hypotheses[0, 0] *= 100.0  # no root brings this one in front of the camera
    best = best_by_reprojection(hypotheses, keypoints, torch.ones(3, 17), K)
    assert torch.equal(best[0], hypotheses[0, truth[0]])
    hypotheses[1] = torch.nan
    best = best_by_reprojection(hypotheses, keypoints, torch.ones(3, 17), K)
    assert torch.isnan(best[1]).all()
    assert torch.equal(best[[0, 2]], hypotheses[rows, truth][[0, 2]])


def test_density_pick_takes_the_heavier_of_two_clusters():
    """Where the medoid is drawn towards the middle: a dense pair beside many that lie far apart."""
    values = torch.tensor([0.0, 0.1, 0.2, 5.0, 7.0, 9.0, 11.0])
    hypotheses = torch.zeros(1, 7, 1, 3)
    hypotheses[0, :, 0, 0] = values
    assert float(density_pick_of_hypotheses(hypotheses)[0, 0, 0]) < 0.3
    assert medoid_of_hypotheses(hypotheses)[0, 0, 0] == 5.0
    assert torch.equal(density_pick_of_hypotheses(hypotheses[:, 3:4]), hypotheses[:, 3])
    same = torch.randn(2, 1, 17, 3).expand(2, 4, 17, 3)
    assert torch.equal(density_pick_of_hypotheses(same), same[:, 0])


def test_refining_the_true_pose_changes_nothing(scene):
    hypotheses, keypoints, truth, _ = scene
    refined = refine_by_reprojection(hypotheses, keypoints, torch.ones(3, 17), K)
    rows = torch.arange(3)
    torch.testing.assert_close(refined[rows, truth], hypotheses[rows, truth], rtol=0, atol=1e-5)
    assert not refined[:, :, 0].any()


def test_refining_by_hand(scene):
    """Depth stays; sideways each joint goes S / (S + R) of the way to its ray, worked out joint by joint."""
    hypotheses, keypoints, _, _ = scene
    keypoints, confidence = keypoints.double(), torch.ones(3, 17, dtype=torch.float64)
    keypoints[1, 4], confidence[1, 4] = torch.nan, 0.0
    confidence[2, 5] = 0.5
    hypotheses, k = hypotheses.double(), K.double()
    _, root = reprojection_error(hypotheses, keypoints, confidence, k)
    refined = refine_by_reprojection(hypotheses, keypoints, confidence, k)
    for frame in range(3):
        placed = (hypotheses[frame] + root[frame, :, None]).numpy()  # [H, J, 3]
        rays = ((keypoints[frame] - k[:2, 2]) / k[[0, 1], [0, 1]]).numpy()  # [J, 2]
        seen = placed[..., :2] / placed[..., 2:]
        center = seen.mean(axis=0)
        offsets = ((center - rays) ** 2).sum(axis=1)
        moved = placed.copy()
        for joint in range(17):
            if confidence[frame, joint] == 0:
                continue
            spread = ((seen[:, joint] - center[joint]) ** 2).sum(axis=1).mean()
            share = spread / (spread + max(offsets[joint], np.nanmean(offsets))) * float(confidence[frame, joint])
            for pose in moved:
                pose[joint, :2] += share * (rays[joint] * pose[joint, 2] - pose[joint, :2])
        moved -= moved[:, :1].copy()
        np.testing.assert_allclose(refined[frame].numpy(), moved, atol=1e-12)
    half = refine_by_reprojection(hypotheses, keypoints, confidence, k, weight=0.5)
    torch.testing.assert_close(half, 0.5 * (refined + hypotheses))
    assert torch.equal(refine_by_reprojection(hypotheses, keypoints, torch.zeros(3, 17), k), hypotheses)
    # A single hypothesis, or equal ones, have no spread that a keypoint could narrow.
    torch.testing.assert_close(refine_by_reprojection(hypotheses[:, :1], keypoints, confidence, k), hypotheses[:, :1])


def test_exact_keypoints_are_followed_and_outliers_are_not(scene):
    """Hypotheses scattered around the truth: nearly all the way to an exact keypoint, hardly to one that is far off."""
    hypotheses, keypoints, truth, _ = scene
    confidence = torch.ones(3, 17)
    around = hypotheses[torch.arange(3), truth][:, None] + 0.03 * torch.randn(3, 40, 17, 3)
    around = around - around[:, :, :1]

    def spread(poses):
        _, root = reprojection_error(poses, keypoints, confidence, K)
        placed = poses + root[:, :, None]
        return (placed[..., :2] / placed[..., 2:]).std(dim=1).norm(dim=-1)[:, 1:]  # [B, J - 1]

    refined = refine_by_reprojection(around, keypoints, confidence, K)
    assert float((spread(refined) / spread(around)).mean()) < 0.6
    keypoints = keypoints.clone()
    keypoints[:, 16] += 120.0
    moved = refine_by_reprojection(around, keypoints, confidence, K) - around
    assert float(moved[:, :, 16].norm(dim=-1).mean()) < 0.05


def test_mean_by_reprojection(scene):
    hypotheses, keypoints, truth, _ = scene
    confidence, rows = torch.ones(3, 17), torch.arange(3)
    cold = mean_by_reprojection(hypotheses, keypoints, confidence, K, weight=0.0, temperature=1e-4)
    torch.testing.assert_close(cold, hypotheses[rows, truth], rtol=0, atol=1e-5)
    hot = mean_by_reprojection(hypotheses, keypoints, confidence, K, weight=0.0, temperature=float("inf"))
    torch.testing.assert_close(hot, hypotheses.mean(dim=1))
    unplaced = mean_by_reprojection(hypotheses, keypoints, torch.zeros(3, 17), K)
    torch.testing.assert_close(unplaced, hypotheses.mean(dim=1))
