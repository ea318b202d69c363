"""Errors of one pose against hand arithmetic and independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metric_cases import DTYPES, randn, rotation, scipy_p_mpjpe, three_joints

from diffupose import metrics


@DTYPES
def test_known_values(dtype):
    predicted, target = three_joints(dtype)
    errors = torch.tensor([0.0, 50.0, 130.0], dtype=dtype)
    torch.testing.assert_close(metrics.per_joint_error(predicted, target), errors, rtol=0, atol=1e-3)
    assert float(metrics.mpjpe(predicted, target)) == pytest.approx(60.0, abs=1e-3)  # (0 + 50 + 130) / 3
    assert metrics.mpjpe(predicted, target).dtype == dtype


def test_n_mpjpe_by_hand():
    predicted = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    # s = (1*3 + 2*1) / (1 + 4) = 1, so nothing changes: errors 0, 2000, 1000 mm.
    assert float(metrics.n_mpjpe(predicted, target)) == pytest.approx(1000.0)
    # Twice the target's joint: s = (1*3 + 2*3.5) / 5 = 2; errors 0, |2 - 3| = 1 m, |4 - 3.5| = 0.5 m; mean 500 mm.
    target[2, 1] = 3.5
    assert float(metrics.n_mpjpe(predicted, target)) == pytest.approx(500.0)


def test_n_mpjpe_has_one_scale_per_pose_whatever_the_leading_axes():
    predicted, target = randn(5, 17, 3, seed=1), randn(5, 17, 3, seed=2)
    expected = metrics.n_mpjpe(predicted, target)
    with_frame_axis = metrics.n_mpjpe(predicted.unsqueeze(1), target.unsqueeze(1))
    assert with_frame_axis.shape == (5, 1)
    torch.testing.assert_close(with_frame_axis.squeeze(1), expected, rtol=1e-12, atol=0)
    # Stretching one axis is no scaling, so an error must remain: a scale per axis would remove it.
    stretched = target * torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    assert bool((metrics.n_mpjpe(stretched.unsqueeze(1), target.unsqueeze(1)) > 10.0).all())


def test_n_mpjpe_is_the_least_squares_scale():
    predicted, target = randn(17, 3, seed=3), randn(17, 3, seed=4)
    scale = np.linalg.lstsq(predicted.reshape(-1, 1).numpy(), target.reshape(-1).numpy(), rcond=None)[0][0]
    expected = metrics.mpjpe(scale * predicted, target)
    torch.testing.assert_close(metrics.n_mpjpe(predicted, target), expected, rtol=1e-10, atol=0)
    assert float(metrics.n_mpjpe(torch.zeros(17, 3), torch.ones(17, 3))) == pytest.approx(1000 * math.sqrt(3))


def test_mpjve_by_hand():
    target = torch.zeros(3, 2, 3, dtype=torch.float64)
    predicted = target.clone()
    predicted[:, 1, 0] = torch.tensor([0.10, 0.13, 0.11])
    # Joint 0: 0 and 0. Joint 1: steps of +30 and -20 mm. Mean (0 + 0 + 30 + 20) / 4 = 12.5; the offset does not count.
    assert float(metrics.mpjve(predicted, target)) == pytest.approx(12.5, abs=1e-5)
    assert bool(metrics.mpjve(predicted[:1], target[:1]).isnan())


def test_pck_by_hand():
    predicted, target = three_joints()
    assert float(metrics.pck(predicted, target)) == pytest.approx(100.0)
    assert float(metrics.pck(predicted, target, threshold_mm=100.0)) == pytest.approx(200.0 / 3.0)
    assert float(metrics.pck(predicted, target, threshold_mm=40.0)) == pytest.approx(100.0 / 3.0)
    # An error that equals the threshold is not below it: 0.125 m is exact in binary.
    exact = torch.tensor([[0.125, 0.0, 0.0]], dtype=torch.float64)
    assert float(metrics.pck(exact, torch.zeros_like(exact), threshold_mm=125.0)) == 0.0
    assert float(metrics.pck(exact, torch.zeros_like(exact), threshold_mm=125.001)) == 100.0


def test_auc_by_hand():
    def auc_of(*errors_mm: float) -> float:
        predicted = torch.zeros(len(errors_mm), 3, dtype=torch.float64)
        predicted[:, 2] = torch.tensor(errors_mm, dtype=torch.float64) / 1000.0
        return float(metrics.auc(predicted, torch.zeros_like(predicted)))

    # Of the 31 thresholds 0, 5, ..., 150: 30 exceed 0 mm; 24 exceed 32 mm (35, 40, ..., 150); 0 exceed 151 mm.
    assert auc_of(0.0) == pytest.approx(100.0 * 30 / 31)
    assert auc_of(32.0) == pytest.approx(100.0 * 24 / 31)
    assert auc_of(151.0) == 0.0
    assert auc_of(0.0, 32.0, 151.0) == pytest.approx(100.0 * (30 + 24 + 0) / (3 * 31))


# Procrustes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joints", [3, 4, 16, 17])
def test_p_mpjpe_against_scipy(joints):
    predicted, target = randn(40, joints, 3, seed=5), randn(40, joints, 3, seed=6)
    # A mirrored, slightly disturbed copy: the unrestricted optimum is a reflection.
    predicted[20:] = target[20:] * torch.tensor([-1.0, 1.0, 1.0]) + 0.01 * predicted[20:]
    got = metrics.p_mpjpe(predicted, target)
    expected = [scipy_p_mpjpe(x.numpy(), y.numpy()) for x, y in zip(predicted, target, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-8, atol=1e-8)


@DTYPES
def test_p_mpjpe_ignores_similarity_but_not_reflection(dtype):
    target = randn(8, 17, 3, seed=7)
    moved = 0.3 * target @ rotation(8) + torch.tensor([5.0, -2.0, 1.0], dtype=torch.float64)
    tolerance = 1e-9 if dtype == torch.float64 else 0.02
    assert float(metrics.p_mpjpe(moved.to(dtype), target.to(dtype)).max()) < tolerance
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    assert float(metrics.p_mpjpe(mirrored.to(dtype), target.to(dtype)).min()) > 100.0


def test_p_mpjpe_of_flat_poses():
    target = randn(4, 17, 3, seed=9)
    target[..., 2] = 0.0
    # Turning a flat pose by half a turn mirrors it, so its mirror image is reached by a rotation.
    mirrored = target * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    assert float(metrics.p_mpjpe(mirrored, target).max()) < 1e-9
    line = torch.linspace(0, 1, 17, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert float(metrics.p_mpjpe(line @ rotation(10), line)) < 1e-9


@DTYPES
def test_p_mpjpe_of_degenerate_poses(dtype):
    point = torch.full((1, 2, 3), 0.5, dtype=dtype)
    segment = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]], dtype=dtype)
    # The point goes to the centre (0, 0, 1), one metre from both ends; a target in one point is always reached.
    assert float(metrics.p_mpjpe(point, segment)) == pytest.approx(1000.0)
    assert float(metrics.p_mpjpe(segment, point)) == pytest.approx(0.0, abs=1e-3)
    assert float(metrics.p_mpjpe(point, point)) == pytest.approx(0.0, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 20.0), st.sampled_from([1, 2, 15, 16, 17]))
def test_aligned_errors_do_not_change_with_the_prediction_s_similarity(seed, scale, joints):
    predicted, target = randn(joints, 3, seed=seed), randn(joints, 3, seed=seed + 1)
    moved = scale * predicted @ rotation(seed + 2) + randn(3, seed=seed + 3)
    torch.testing.assert_close(metrics.p_mpjpe(moved, target), metrics.p_mpjpe(predicted, target), rtol=1e-7, atol=1e-6)
    scaled = metrics.n_mpjpe(scale * predicted, target)
    torch.testing.assert_close(scaled, metrics.n_mpjpe(predicted, target), rtol=1e-9, atol=1e-9)
