"""Every metric: NaN, empty batches, shapes, dtypes, devices, errors."""

from __future__ import annotations

import math

import pytest
import torch
from support.metric_cases import DTYPES, PAIR_METRICS, SET_METRICS, TOTAL_METRICS, gaussian_case, randn

from diffupose import metrics


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
