"""Metrics against hand arithmetic, independent implementations, and simulations whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffupose import metrics
from diffupose.metrics import _special
from diffupose.metrics import hypotheses as hypotheses_module
from diffupose.metrics._special import f_cdf

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
PAIR_METRICS = [metrics.mpjpe, metrics.p_mpjpe, metrics.n_mpjpe, metrics.pck, metrics.auc, metrics.per_joint_error]
SET_METRICS = [metrics.energy_score, metrics.oracle_best_of_hypotheses, metrics.oracle_best_joint_of_hypotheses]
TOTAL_METRICS = [metrics.coverage, metrics.dispersion, metrics.spread_error_correlation]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal float64 numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int) -> Tensor:
    """Return a random proper rotation, float64."""
    q, _ = torch.linalg.qr(randn(3, 3, seed=seed))
    return q * torch.linalg.det(q)


def three_joints(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a prediction and a target with errors of 0, 50 and 130 mm."""
    target = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=dtype)
    # |(0.03, 0.04, 0)| = 0.05 m and |(0.03, 0.04, 0.12)| = sqrt(0.0009 + 0.0016 + 0.0144) = 0.13 m.
    offset = torch.tensor([[0.0, 0.0, 0.0], [0.03, 0.04, 0.0], [0.03, 0.04, 0.12]], dtype=dtype)
    return target + offset, target


def scipy_p_mpjpe(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return the P-MPJPE in millimetres with SciPy's orthogonal Procrustes, reflections undone."""
    x, y = predicted - predicted.mean(0), target - target.mean(0)
    matrix, _ = scipy.linalg.orthogonal_procrustes(x, y)
    if np.linalg.det(matrix) < 0:
        # The best rotation is the best orthogonal map composed with a flip along the weakest singular direction.
        u, _, _ = np.linalg.svd(x.T @ y)
        matrix = u @ np.diag([1.0, 1.0, -1.0]) @ u.T @ matrix
    rotated = x @ matrix
    scale = (rotated * y).sum() / (rotated * rotated).sum()
    return float(1000.0 * np.linalg.norm(scale * rotated - y, axis=1).mean())


def gaussian_case(frames: int, count: int, joints: int, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return hypotheses and targets from one correlated Gaussian per joint, the hypotheses' spread times ``spread``."""
    factor = 0.1 * randn(joints, 3, 3, seed=99)
    center = randn(frames, 1, joints, 3, seed=seed + 1)
    draws = torch.einsum("jcd,bhjd->bhjc", factor, randn(frames, count + 1, joints, 3, seed=seed + 2))
    return center + spread * draws[:, :count], (center + draws[:, count:]).squeeze(1)


# Known values ---------------------------------------------------------------------------------------------------------


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


# Hypotheses -----------------------------------------------------------------------------------------------------------


def test_mean_and_oracles_by_hand():
    target = torch.zeros(1, 2, 3, dtype=torch.float64)
    hypotheses = torch.zeros(1, 3, 2, 3, dtype=torch.float64)
    hypotheses[0, :, 0, 0] = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    hypotheses[0, :, 1, 1] = torch.tensor([0.6, 0.1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        metrics.mean_of_hypotheses(hypotheses)[0],
        torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.4, 0.0]], dtype=torch.float64),
    )
    # Pose errors (100+600)/2, (300+100)/2, (200+500)/2 = 350, 200, 350; joint minima (100 + 100) / 2.
    assert float(metrics.oracle_best_of_hypotheses(hypotheses, target)) == pytest.approx(200.0)
    assert float(metrics.oracle_best_joint_of_hypotheses(hypotheses, target)) == pytest.approx(100.0)


@DTYPES
def test_covariance_of_hypotheses(dtype):
    hypotheses = (3.0 + 0.1 * randn(2, 9, 5, 3, seed=11)).to(dtype)
    got = metrics.covariance_of_hypotheses(hypotheses)
    assert got.shape == (2, 5, 3, 3)
    for frame in range(2):
        for joint in range(5):
            expected = np.cov(hypotheses[frame, :, joint].double().numpy(), rowvar=False, ddof=1)
            rtol = 1e-10 if dtype == torch.float64 else 1e-4
            np.testing.assert_allclose(got[frame, joint].numpy(), expected, rtol=rtol, atol=rtol * 0.01)
    assert bool(metrics.covariance_of_hypotheses(hypotheses[:, :3]).isnan().all())
    assert bool(metrics.covariance_of_hypotheses(hypotheses[:, :4]).isfinite().all())


@DTYPES
def test_equal_hypotheses_have_exactly_no_spread(dtype):
    pose = randn(3, 1, 17, 3, seed=12).to(dtype)
    hypotheses = pose.expand(3, 10, 17, 3)
    assert torch.equal(metrics.mean_of_hypotheses(hypotheses), pose.squeeze(1))
    assert float(metrics.covariance_of_hypotheses(hypotheses).abs().max()) == 0.0


def test_energy_score_by_hand():
    target = torch.zeros(1, 1, 3, dtype=torch.float64)
    hypotheses = torch.tensor([[[[0.3, 0.0, 0.4]], [[0.0, 0.0, 0.4]], [[0.0, 0.0, 0.0]]]], dtype=torch.float64)
    # Errors 500, 400, 0: mean 300. Distances 300, 500, 400: mean 400. Score 300 - 400 / 2 = 100.
    assert float(metrics.energy_score(hypotheses, target)) == pytest.approx(100.0)


@DTYPES
@pytest.mark.parametrize("max_pairs", [1, 400, 1 << 24])
def test_energy_score_against_double_loop(dtype, max_pairs, monkeypatch):
    monkeypatch.setattr(hypotheses_module, "_MAX_PAIRS", max_pairs)
    hypotheses, target = randn(5, 6, 4, 3, seed=13).to(dtype), randn(5, 4, 3, seed=14).to(dtype)
    got = metrics.energy_score(hypotheses, target)
    x, y = hypotheses.double().numpy(), target.double().numpy()
    for frame in range(5):
        total = 0.0
        for joint in range(4):
            near = sum(np.linalg.norm(x[frame, h, joint] - y[frame, joint]) for h in range(6)) / 6
            pairs = [
                np.linalg.norm(x[frame, h, joint] - x[frame, k, joint]) for h in range(6) for k in range(6) if h != k
            ]
            total += near - 0.5 * sum(pairs) / 30
        assert float(got[frame]) == pytest.approx(1000.0 * total / 4, rel=1e-10 if dtype == torch.float64 else 1e-5)


def test_energy_score_of_one_hypothesis_is_mpjpe():
    pose, target = randn(7, 17, 3, seed=15), randn(7, 17, 3, seed=16)
    torch.testing.assert_close(metrics.energy_score(pose.unsqueeze(1), target), metrics.mpjpe(pose, target))


def test_energy_score_of_near_hypotheses_keeps_its_digits():
    # 0.1 mm apart, three metres from the origin: expanding the square would lose the distance in float32.
    base = torch.tensor([3.0, 3.0, 3.0], dtype=torch.float32)
    hypotheses = torch.stack([base, base + torch.tensor([1e-4, 0.0, 0.0])]).reshape(1, 2, 1, 3).expand(1, 2, 1, 3)
    hypotheses = hypotheses.repeat(1, 20, 1, 1)
    distance = 1000.0 * float(hypotheses[0, 1, 0, 0] - hypotheses[0, 0, 0, 0])
    # 40 hypotheses in two points: mean error d/2, and 2 * 20 * 20 of the 40 * 39 ordered pairs are d apart.
    expected = 0.5 * distance - 0.5 * distance * 800 / 1560
    assert float(metrics.energy_score(hypotheses, base.reshape(1, 1, 3))) == pytest.approx(expected, abs=1e-4)


def test_energy_score_is_proper_where_the_oracle_is_not():
    scores, oracles = {}, {}
    for spread in (0.3, 1.0, 3.0):
        hypotheses, target = gaussian_case(3000, 10, 2, spread)
        scores[spread] = float(metrics.energy_score(hypotheses, target).mean())
        oracles[spread] = float(metrics.oracle_best_of_hypotheses(hypotheses, target).mean())
    assert scores[1.0] < 0.97 * scores[0.3]
    assert scores[1.0] < 0.97 * scores[3.0]
    # Shifting every hypothesis must cost too.
    hypotheses, target = gaussian_case(3000, 10, 2)
    assert float(metrics.energy_score(hypotheses + 0.1, target).mean()) > 1.03 * scores[1.0]
    assert oracles[1.0] < oracles[0.3]


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denominator", [1, 2, 3, 7, 17, 47, 197, 4997])
@pytest.mark.parametrize("numerator", [1, 3, 8])
def test_f_cdf_against_scipy(numerator, denominator):
    value = np.concatenate([[0.0], np.logspace(-8, 8, 400)])
    got = f_cdf(torch.from_numpy(value), numerator, denominator).numpy()
    np.testing.assert_allclose(got, scipy.stats.f.cdf(value, numerator, denominator), rtol=1e-10, atol=1e-12)


def test_f_cdf_edges():
    special = torch.tensor([-1.0, 0.0, torch.inf, torch.nan], dtype=torch.float64)
    got = f_cdf(special, 3.0, 7.0).tolist()
    assert got[:3] == [0.0, 0.0, 1.0]
    assert math.isnan(got[3])
    assert f_cdf(torch.zeros(0, dtype=torch.float64), 3.0, 7.0).shape == (0,)
    with pytest.raises(ValueError, match="value must be float64"):
        f_cdf(torch.ones(1), 3.0, 7.0)
    with pytest.raises(ValueError, match="degrees of freedom must be positive"):
        f_cdf(special, 3.0, 0.0)


def test_f_cdf_says_when_it_does_not_converge(monkeypatch):
    monkeypatch.setattr(_special, "_MAX_TERMS", 1)
    with pytest.raises(ArithmeticError, match="did not converge"):
        f_cdf(torch.ones(1, dtype=torch.float64), 3.0, 50.0)


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


# Edges ----------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("metric", PAIR_METRICS, ids=lambda metric: metric.__name__)
def test_nan_stays_in_its_row(metric, dtype):
    predicted, target = randn(4, 17, 3, seed=23).to(dtype), randn(4, 17, 3, seed=24).to(dtype)
    clean = metric(predicted, target)
    predicted[1, 5, 2] = torch.nan
    target[3] = torch.nan
    dirty = metric(predicted, target)
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]])
    assert bool(dirty[1].isnan().any())
    assert bool(dirty[3].isnan().all())
    assert dirty.dtype == dtype


@pytest.mark.parametrize("metric", SET_METRICS, ids=lambda metric: metric.__name__)
def test_nan_stays_in_its_frame(metric):
    hypotheses, target = randn(3, 5, 17, 3, seed=25), randn(3, 17, 3, seed=26)
    clean = metric(hypotheses, target)
    hypotheses[1, 2, 3, 0] = torch.nan
    dirty = metric(hypotheses, target)
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]])
    assert bool(dirty[1].isnan())


@pytest.mark.parametrize("metric", TOTAL_METRICS, ids=lambda metric: metric.__name__)
def test_unusable_frames_are_left_out_of_totals(metric):
    hypotheses, target = gaussian_case(20, 10, 3)
    expected = metric(hypotheses, target)
    padded = torch.cat([hypotheses, torch.full_like(hypotheses[:2], torch.nan)])
    padded_target = torch.cat([target, target[:2]])
    torch.testing.assert_close(metric(padded, padded_target), expected)
    assert bool(expected.isfinite().all())
    assert bool(metric(hypotheses[:, :3], target).isnan().all())  # too few hypotheses for a covariance


@pytest.mark.parametrize("joints", [1, 15, 16, 17])
def test_empty_batch_and_joint_counts(joints):
    for metric in PAIR_METRICS:
        for lead in [(0,), (), (2, 0), (2, 3)]:
            shape = (*lead, joints) if metric is metrics.per_joint_error else lead
            assert metric(randn(*lead, joints, 3), randn(*lead, joints, 3, seed=1)).shape == shape
    for frames in (0, 1):
        hypotheses, target = randn(frames, 5, joints, 3), randn(frames, joints, 3, seed=1)
        for metric in SET_METRICS:
            assert metric(hypotheses, target).shape == (frames,)
        assert metrics.mean_of_hypotheses(hypotheses).shape == (frames, joints, 3)
        assert metrics.covariance_of_hypotheses(hypotheses).shape == (frames, joints, 3, 3)
        assert metrics.coverage(hypotheses, target).shape == (19, joints)
    empty = torch.zeros(0, 5, 2, 3), torch.zeros(0, 2, 3)
    for metric in TOTAL_METRICS:
        assert bool(metric(*empty).isnan().all())


def test_batched_and_non_contiguous_inputs_agree_with_single_poses():
    predicted, target = randn(2, 6, 17, 4, seed=27)[..., 1:], randn(2, 6, 34, 3, seed=28)[..., ::2, :]
    for metric in PAIR_METRICS:
        got = metric(predicted, target)
        for row in range(2):
            for frame in range(6):
                single = metric(predicted[row, frame].contiguous(), target[row, frame].contiguous())
                torch.testing.assert_close(got[row, frame], single, rtol=1e-10, atol=1e-9)


def test_mixed_precision_is_promoted_and_inputs_stay_unchanged():
    predicted, target = randn(3, 17, 3).float(), randn(3, 17, 3, seed=1)
    before = predicted.clone(), target.clone()
    for metric in PAIR_METRICS:
        torch.testing.assert_close(metric(predicted, target), metric(predicted.double(), target))
    assert metrics.energy_score(predicted.unsqueeze(1), target).dtype == torch.float64
    assert torch.equal(predicted, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    hypotheses, target = gaussian_case(50, 10, 17)
    for metric in PAIR_METRICS:
        got = metric(hypotheses[:, 0].cuda(), target.cuda())
        torch.testing.assert_close(got.cpu(), metric(hypotheses[:, 0], target))
    for metric in [*SET_METRICS, *TOTAL_METRICS]:
        torch.testing.assert_close(metric(hypotheses.cuda(), target.cuda()).cpu(), metric(hypotheses, target))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [*PAIR_METRICS, metrics.mpjve], ids=lambda metric: metric.__name__)
def test_errors_of_pairs(metric):
    pose = torch.zeros(2, 17, 3)
    with pytest.raises(ValueError, match=r"predicted must have shape \[.*J, 3\], got \(2, 17, 2\)"):
        metric(pose[..., :2], pose)
    with pytest.raises(ValueError, match=r"predicted must have shape \[.*J, 3\], got \(2, 0, 3\)"):
        metric(pose[:, :0], pose)
    with pytest.raises(ValueError, match=r"target must have the shape of predicted \(2, 17, 3\), got \(2, 16, 3\)"):
        metric(pose, pose[:, :16])
    with pytest.raises(ValueError, match=r"target must have shape \[.*J, 3\], got \(3,\)"):
        metric(pose, pose[0, 0])
    with pytest.raises(ValueError, match=r"predicted must be float32 or float64, got torch\.float16"):
        metric(pose.half(), pose)


@pytest.mark.parametrize("metric", [*SET_METRICS, *TOTAL_METRICS], ids=lambda metric: metric.__name__)
def test_errors_of_hypotheses(metric):
    hypotheses, target = torch.zeros(2, 5, 17, 3), torch.zeros(2, 17, 3)
    with pytest.raises(ValueError, match=r"hypotheses must have shape \[B, H, J, 3\], got \(2, 17, 3\)"):
        metric(target, target)
    with pytest.raises(ValueError, match="hypotheses must hold at least one hypothesis"):
        metric(hypotheses[:, :0], target)
    with pytest.raises(ValueError, match=r"target must have shape \[2, 17, 3\], got \(1, 17, 3\)"):
        metric(hypotheses, target[:1])
    with pytest.raises(ValueError, match=r"target must have shape \[B, J, 3\], got \(17, 3\)"):
        metric(hypotheses, target[0])
    with pytest.raises(ValueError, match=r"hypotheses must be float32 or float64, got torch\.int64"):
        metric(hypotheses.long(), target)


@pytest.mark.parametrize("metric", [metrics.mean_of_hypotheses, metrics.covariance_of_hypotheses])
def test_errors_of_moments_of_hypotheses(metric):
    with pytest.raises(ValueError, match=r"hypotheses must have shape \[B, H, J, 3\], got \(5, 17, 3\)"):
        metric(torch.zeros(5, 17, 3))


def test_errors_of_coverage():
    hypotheses, target = gaussian_case(4, 10, 3)
    mean, covariance = metrics.mean_of_hypotheses(hypotheses), metrics.covariance_of_hypotheses(hypotheses)
    for levels in ([], [0.0], [0.5, 1.0], [math.nan]):
        with pytest.raises(ValueError, match="levels must lie strictly between 0 and 1"):
            metrics.coverage(hypotheses, target, levels=levels)
    with pytest.raises(ValueError, match=r"scale must have shape \[3\], got \(2,\)"):
        metrics.coverage(hypotheses, target, scale=torch.ones(2))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            metrics.coverage(hypotheses, target, scale=torch.tensor([1.0, bad, 1.0]))
    with pytest.raises(ValueError, match=r"covariance must have shape \[4, 3, 3, 3\], got \(4, 3, 3\)"):
        metrics.region_level(mean, covariance[..., 0], target, num_hypotheses=10)
    with pytest.raises(ValueError, match=r"target must have the shape of mean"):
        metrics.region_level(mean, covariance, target[:2], num_hypotheses=10)
    with pytest.raises(ValueError, match="num_hypotheses must be at least 1, got 0"):
        metrics.region_level(mean, covariance, target, num_hypotheses=0)
    assert bool(metrics.region_level(mean, covariance, target, num_hypotheses=3).isnan().all())


def test_errors_of_root_joint_and_calibration_error():
    hypotheses, target = gaussian_case(4, 10, 3)
    for metric in (metrics.dispersion, metrics.spread_error_correlation):
        for root_joint in (-1, 3):
            with pytest.raises(ValueError, match=r"root_joint must be in 0\.\.2"):
                metric(hypotheses, target, root_joint=root_joint)
        with pytest.raises(ValueError, match="at least one joint besides the root"):
            metric(hypotheses[:, :, :1], target[:, :1])
    with pytest.raises(ValueError, match=r"empirical must have shape \[19, J\], got \(2, 17\)"):
        metrics.expected_calibration_error(torch.zeros(2, 17))
    with pytest.raises(ValueError, match=r"root_joint must be in 0\.\.16, got 17"):
        metrics.expected_calibration_error(torch.zeros(19, 17), root_joint=17)
