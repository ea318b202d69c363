"""Scores of a set of hypotheses against hand arithmetic, loops, and a simulation whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.metric_cases import DTYPES, gaussian_case, randn

from diffupose import metrics
from diffupose.metrics import hypotheses as hypotheses_module


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
