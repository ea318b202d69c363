"""Regions, dispersion and rank correlation against SciPy, hand arithmetic and Gaussian samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from support.metric_cases import DTYPES, gaussian_case, randn, rotation

from diffupose import metrics


def test_region_level_in_closed_form():
    """With N = 5 it is x^1.5, where x = 3 f / (3 f + 2)."""
    distance = torch.tensor([0.0, 1e-12, 0.3, 7.2, 1e6, torch.inf], dtype=torch.float64)
    covariance = torch.eye(3, dtype=torch.float64).expand(1, 6, 3, 3)
    target = torch.zeros(1, 6, 3, dtype=torch.float64)
    target[..., 0] = distance.sqrt()
    f = distance * 10 / 72  # N (N - 3) / (3 (N^2 - 1))
    expected = (3 * f / (3 * f + 2)).pow(1.5)
    expected[-1] = torch.nan  # a pose at infinity is no pose
    got = metrics.region_level(torch.zeros_like(target), covariance, target, num_hypotheses=5)
    torch.testing.assert_close(got, expected[None], rtol=1e-12, atol=0.0, equal_nan=True)


def test_region_level_by_hand():
    # N = 10: the factor is 3 * 99 / (10 * 7) = 4.242857; the statistic is 0.2^2/0.01 + 0.1^2/0.04 + 0 = 4.25.
    covariance = torch.diag(torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64)).reshape(1, 1, 3, 3)
    target = torch.tensor([[[0.2, 0.1, 0.0]]], dtype=torch.float64)
    mean = torch.zeros_like(target)
    expected = scipy.stats.f.cdf(4.25 / (297 / 70), 3, 7)
    got = metrics.region_level(mean, covariance, target, num_hypotheses=10)
    assert float(got) == pytest.approx(expected, abs=1e-12)
    scaled = metrics.region_level(mean, covariance, target, num_hypotheses=10, scale=torch.tensor([2.0]))
    assert float(scaled) == pytest.approx(scipy.stats.f.cdf(4.25 / 2 / (297 / 70), 3, 7), abs=1e-12)
    # The boundary of the region at level a is where the level reached passes a.
    inside = metrics.coverage_from_moments(
        mean, covariance, target, num_hypotheses=10, levels=[expected - 1e-9, expected + 1e-9]
    )
    assert inside.flatten().tolist() == [0.0, 1.0]


def test_region_level_against_an_inverted_matrix():
    factor = randn(6, 5, 3, 3, seed=17)
    covariance = factor @ factor.transpose(-1, -2) + 0.1 * torch.eye(3, dtype=torch.float64)
    mean, target = randn(6, 5, 3, seed=18), randn(6, 5, 3, seed=19)
    error = (target - mean).numpy()
    statistic = np.einsum("bjc,bjcd,bjd->bj", error, np.linalg.inv(covariance.numpy()), error)
    expected = scipy.stats.f.cdf(statistic * 50 * 47 / (3 * (50**2 - 1)), 3, 47)
    got = metrics.region_level(mean, covariance, target, num_hypotheses=50)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("count", [4, 10, 50])
def test_coverage_of_gaussian_samples_is_nominal(count, dtype):
    frames = 4000
    hypotheses, target = gaussian_case(frames, count, 3)
    empirical = metrics.coverage(hypotheses.to(dtype), target.to(dtype))
    nominal = torch.tensor(metrics.DEFAULT_LEVELS, dtype=dtype).unsqueeze(1)
    assert empirical.shape == (19, 3)
    assert empirical.dtype == dtype
    # Four and a half standard errors of a share, for each of 57 numbers.
    assert bool(((empirical - nominal).abs() < 4.5 * (nominal * (1 - nominal) / frames).sqrt()).all())
    error, worst = metrics.expected_calibration_error(empirical)
    assert float(error) <= float(worst) < 0.03


@pytest.mark.parametrize("count", [10, 50])
def test_coverage_notices_a_wrong_spread(count):
    narrow = metrics.coverage(*gaussian_case(4000, count, 3, spread=0.7))
    wide = metrics.coverage(*gaussian_case(4000, count, 3, spread=1.4))
    middle = metrics.DEFAULT_LEVELS.index(0.5)
    assert bool((narrow[middle] < 0.4).all())
    assert bool((wide[middle] > 0.6).all())
    assert float(metrics.expected_calibration_error(narrow)[0]) > 0.08
    assert float(metrics.expected_calibration_error(wide)[0]) > 0.08
    # The factor 1 / 0.7^2 on the covariance repairs the narrow set, joint by joint.
    hypotheses, target = gaussian_case(4000, count, 3, spread=0.7)
    scale = torch.tensor([1.0, 1.0, 1 / 0.49], dtype=torch.float64)
    repaired = metrics.coverage(hypotheses, target, scale=scale)
    torch.testing.assert_close(repaired[:, :2], narrow[:, :2])
    assert float((repaired[:, 2] - torch.tensor(metrics.DEFAULT_LEVELS, dtype=torch.float64)).abs().max()) < 0.035


@DTYPES
def test_singular_covariances(dtype):
    def level(covariance: list[float], error: list[float]) -> float:
        matrix = torch.diag(torch.tensor(covariance, dtype=torch.float64))
        turn = rotation(20)  # so that the plane is not aligned with the axes
        matrix = (turn @ matrix @ turn.T).to(dtype).reshape(1, 1, 3, 3)
        target = (turn @ torch.tensor(error, dtype=torch.float64)).to(dtype).reshape(1, 1, 3)
        return float(metrics.region_level(torch.zeros_like(target), matrix, target, num_hypotheses=10))

    assert level([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]) == 0.0
    assert level([0.0, 0.0, 0.0], [0.0, 0.01, 0.0]) == 1.0
    assert level([0.0, 0.0, 0.01], [0.0, 0.001, 0.0]) == 1.0
    in_plane = scipy.stats.f.cdf(4.0 / (297 / 70), 3, 7)
    assert level([0.0, 0.04, 0.01], [0.0, 0.0, 0.2]) == pytest.approx(in_plane, abs=1e-5)


def test_spread_below_rounding_counts_as_none():
    # 3 eps * 0.01 = 3.6e-9 in float32: the variance 1e-9 is below it and the squared error 1e-8 is above.
    covariance = torch.diag(torch.tensor([1e-9, 0.01, 0.01])).reshape(1, 1, 3, 3)
    target = torch.tensor([[[1e-4, 0.0, 0.0]]])
    mean = torch.zeros_like(target)
    assert float(metrics.region_level(mean, covariance, target, num_hypotheses=10)) == 1.0
    assert float(metrics.region_level(mean, covariance, 0.1 * target, num_hypotheses=10)) == 0.0
    # float64 resolves both, and the target is sqrt(1e-8 / 1e-9) standard deviations away.
    expected = scipy.stats.f.cdf(10.0 / (297 / 70), 3, 7)
    exact = metrics.region_level(mean.double(), covariance.double(), target.double(), num_hypotheses=10)
    assert float(exact) == pytest.approx(expected, abs=1e-6)


@DTYPES
def test_coverage_of_joints_without_spread(dtype):
    hypotheses, target = gaussian_case(50, 10, 3)
    hypotheses, target = hypotheses.to(dtype), target.to(dtype)
    hypotheses[:, :, 0] = 0.0
    target[:, 0] = 0.0
    hypotheses[:, :, 1] = hypotheses[:, :1, 1]
    target[:, 1] = hypotheses[:, 0, 1] + 0.001
    empirical = metrics.coverage(hypotheses, target)
    assert bool((empirical[:, 0] == 1.0).all())
    assert bool((empirical[:, 1] == 0.0).all())


def test_coverage_from_hypotheses_and_from_moments_agree():
    hypotheses, target = gaussian_case(4000, 10, 3)
    mean, covariance = metrics.mean_of_hypotheses(hypotheses), metrics.covariance_of_hypotheses(hypotheses)
    # Stored moments are usually float32; that must not move the coverage.
    rounded = metrics.coverage_from_moments(mean.float(), covariance.float(), target.float(), num_hypotheses=10)
    torch.testing.assert_close(rounded.double(), metrics.coverage(hypotheses, target), rtol=0, atol=1e-3)
    scale = torch.tensor([0.5, 1.0, 2.0])
    levels = [0.1, 0.9]
    torch.testing.assert_close(
        metrics.coverage_from_moments(mean, covariance, target, num_hypotheses=10, levels=levels, scale=scale),
        metrics.coverage(hypotheses, target, levels=levels, scale=scale),
        rtol=0,
        atol=0,
    )


def test_expected_calibration_error_by_hand():
    empirical = torch.tensor([[1.0, 0.2, 0.5], [1.0, 0.7, 0.8]], dtype=torch.float64)
    # Without joint 0, at levels 0.25 and 0.75: |0.2-0.25| = 0.05, |0.7-0.75| = 0.05, 0.25, 0.05.
    # Joint 1: 0.05; joint 2: 0.15; mean 0.10, worst 0.15.
    error, worst = metrics.expected_calibration_error(empirical, [0.25, 0.75])
    assert float(error) == pytest.approx(0.10)
    assert float(worst) == pytest.approx(0.15)
    # With joint 1 as the root: joint 0 gives (0.75 + 0.25) / 2 = 0.5, joint 2 again 0.15.
    error, worst = metrics.expected_calibration_error(empirical, [0.25, 0.75], root_joint=1)
    assert float(error) == pytest.approx(0.325)
    assert float(worst) == pytest.approx(0.5)


@DTYPES
@pytest.mark.parametrize("count", [4, 10, 50])
def test_dispersion_of_a_draw_from_the_same_gaussian_is_one(count, dtype):
    hypotheses, target = gaussian_case(6000, count, 3)
    assert float(metrics.dispersion(hypotheses.to(dtype), target.to(dtype))) == pytest.approx(1.0, abs=0.03)


def test_dispersion_by_hand():
    # Corners with variance 4/3 per axis, trace 4; error of the mean (3, 4, 0): 5. N = 4, so 1 + 1/4.
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    hypotheses = torch.zeros(1, 4, 2, 3, dtype=torch.float64)
    hypotheses[0, :, 1] = corners
    target = torch.tensor([[[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]], dtype=torch.float64)
    assert float(metrics.dispersion(hypotheses, target)) == pytest.approx(5.0 / math.sqrt(1.25 * 4.0))
    # The root is the other joint: neither error nor spread remain.
    assert bool(metrics.dispersion(hypotheses, target, root_joint=1).isnan())
    narrow, target = gaussian_case(6000, 10, 3, spread=0.5)
    assert float(metrics.dispersion(narrow, target)) > 1.8


@pytest.mark.parametrize("ties", [False, True])
def test_spread_error_correlation_against_scipy(ties):
    frames, joints = 60, 4
    width = 0.1 + randn(frames, joints, seed=21).abs()
    error = 0.5 * width + randn(frames, joints, seed=22).abs()
    if ties:
        # Powers of two: scaling by them keeps equal values exactly equal.
        width, error = 2.0 ** (4 * width).floor(), 2.0 ** (2 * error).floor()
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    hypotheses = torch.einsum("bj,hc->bhjc", width, corners)
    target = torch.zeros(frames, joints, 3, dtype=torch.float64)
    target[..., 0] = error
    expected = scipy.stats.spearmanr(width[:, 1:].flatten().numpy(), error[:, 1:].flatten().numpy()).statistic
    got = metrics.spread_error_correlation(hypotheses, target)
    assert float(got) == pytest.approx(expected, abs=1e-12)
    assert abs(expected) > 0.1
    everything_but_last = metrics.spread_error_correlation(hypotheses, target, root_joint=3)
    expected = scipy.stats.spearmanr(width[:, :3].flatten().numpy(), error[:, :3].flatten().numpy()).statistic
    assert float(everything_but_last) == pytest.approx(expected, abs=1e-12)
    assert bool(metrics.spread_error_correlation(hypotheses[:1, :, :2], target[:1, :2]).isnan())
