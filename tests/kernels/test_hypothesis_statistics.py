"""Mean, covariance, reprojection weights and weighted mean in Triton."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.sweeps import mostly_slow

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.testing import assert_parity, make_inputs, requires_cpp, shape_id

K = torch.tensor([[1000.0, 0.0, 500.0], [0.0, 1100.0, 400.0], [0.0, 0.0, 1.0]])


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Triton's interpreter is NumPy, which warns of numbers that are masked later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def fused(hypotheses, keypoints_2d=None, confidence=None, intrinsics=None, backend="triton", **options):
    view = {"keypoints_2d": keypoints_2d, "confidence": confidence, "intrinsics": intrinsics}
    results = ops.hypothesis_statistics(hypotheses, **view, **options, backend=backend)
    return tuple(hypotheses.new_empty(0) if result is None else result for result in results)


# The last three need several rounds over the hypotheses.
ODD = [(1, 1, 1), (0, 3, 17), (5, 4, 15), (1, 33, 16), (3, 10, 17), (2, 3, 17), (1, 70, 17), (1, 2100, 2), (1, 40, 65)]


@pytest.mark.parametrize("shape", ODD, ids=shape_id)
def test_parity(shape, device):
    """The covariance of few hypotheses is NaN in any dtype. It is compared separately."""

    def moments_only(function):
        return lambda hypotheses: function(hypotheses)[: 1 if shape[1] < 4 else 2]

    inputs = make_inputs("hypothesis_statistics", shape, device=device)
    assert_parity(moments_only(fused), moments_only(reference.hypothesis_statistics), inputs[:1])
    if shape[2] == 1:
        return  # a single joint cannot be placed: see test_nothing_to_place

    def weighted(function):
        return lambda h, k, c, i: function(h, k, c, i)[2:]

    assert_parity(weighted(fused), weighted(reference.hypothesis_statistics), inputs)
    assert bool(fused(*inputs)[1].isnan().all()) == (shape[1] < 4)


def test_far_from_zero(device):
    """Hypotheses hundreds of metres away with a spread of centimetres give results as exact as the reference."""
    (hypotheses,) = make_inputs("hypothesis_statistics", (2, 50, 17, False), device=device)
    hypotheses = hypotheses + torch.tensor([300.0, -200.0, 1000.0], device=device)
    assert_parity(
        lambda h: fused(h)[:2], lambda hypotheses: reference.hypothesis_statistics(hypotheses)[:2], [hypotheses]
    )


@pytest.mark.parametrize("view", [False, True], ids=["moments", "view"])
@pytest.mark.parametrize("count", mostly_slow([50, 10, 300]))
def test_first_hypotheses_far_from_the_rest(count, view, device):
    """The first hypotheses lie 200 standard deviations away: the origin of the sums must not come from them alone."""
    hypotheses, *seen = make_inputs("hypothesis_statistics", (3, count, 5), device=device)
    hypotheses[:, :8] += 10.0
    covariance = fused(hypotheses, *(seen if view else []))[1]
    exact = torch.stack([torch.stack([torch.cov(frame[:, j].double().T) for j in range(5)]) for frame in hypotheses])
    torch.testing.assert_close(covariance.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sideways", mostly_slow([0.5, 0.0, 1.0]))
@pytest.mark.parametrize("distance", [5.0, 100.0])
def test_far_people(distance, sideways, device):
    """With nearly parallel rays, also to the side, results are at least as exact as the reference in float32."""
    hypotheses, _, confidence, intrinsics = make_inputs("hypothesis_statistics", (12, 10, 17), device=device)
    root = distance * torch.tensor([sideways, -0.5 * sideways, 1.0], device=device)
    seen = (hypotheses.mean(dim=1) + root) @ intrinsics.mT
    keypoints = seen[..., :2] / seen[..., 2:] + 25.0 / distance * torch.randn(12, 17, 2, device=device)
    inputs = hypotheses, keypoints, confidence, intrinsics
    exact = reference.hypothesis_statistics(*(tensor.double() for tensor in inputs))
    assert 0.1 < float(exact[2].max()) < 0.9
    for actual, single, truth in zip(fused(*inputs), reference.hypothesis_statistics(*inputs), exact, strict=True):
        allowed = max(2.0 * float((single - truth).abs().max()), 1e-6)
        assert float((actual - truth).abs().max()) <= allowed


@pytest.mark.parametrize("count", [10, 60])
def test_one_infinite_hypothesis(device, count):
    """The mean is infinite, too, or NaN if it is the first hypothesis: differences are taken from that one."""
    (hypotheses,) = make_inputs("hypothesis_statistics", (count, count, 3, False), device=device)
    for i in range(count):
        hypotheses[i, i, 1, 2] = -torch.inf
    mean, covariance, _, _ = fused(hypotheses)
    expected = reference.hypothesis_statistics(hypotheses)
    torch.testing.assert_close(mean, expected[0], equal_nan=True)
    assert torch.equal(covariance.isfinite(), expected[1].isfinite())


def test_equal_hypotheses(device):
    pose = torch.randn(2, 1, 17, 3, device=device)
    mean, covariance, _, _ = fused(pose.repeat(1, 7, 1, 1))
    assert torch.equal(mean, pose.squeeze(1))
    assert float(covariance.abs().max()) == 0.0


def test_a_missing_joint_may_be_anywhere(device):
    """A missing joint behind the camera, or NaN, does not change the weights."""
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (2, 6, 17), device=device)
    confidence[:, 5] = 0.0
    expected = fused(hypotheses, keypoints, confidence, intrinsics)
    assert float(expected[2].std()) > 0.0
    behind = hypotheses.clone()
    behind[:, :, 5, 2] -= 1e4
    torch.testing.assert_close(fused(behind, keypoints, confidence, intrinsics)[2], expected[2])
    lost = keypoints.clone()
    lost[:, 5] = torch.nan
    for value, other in zip(fused(hypotheses, lost, confidence, intrinsics), expected, strict=True):
        torch.testing.assert_close(value, other)


def test_confidence_above_one(device):
    """It counts as a weight among others, but no joint moves past its ray."""
    inputs = list(make_inputs("hypothesis_statistics", (2, 6, 17), device=device))
    inputs[2] = inputs[2] + 3.0 * torch.rand(2, 17, device=device)
    assert_parity(
        lambda *given: fused(*given)[2:],
        lambda h, k, c, i: reference.hypothesis_statistics(h, k, c, i)[2:],
        inputs,
    )


@pytest.mark.parametrize("most", [1e3, 1e6, 1e10])
def test_one_confidence_far_above_the_others(most, device):
    """The rays of the other joints still give the depth."""
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (3, 10, 17), device=device)
    keypoints, confidence[:, 3] = keypoints.nan_to_num(500.0), most
    actual = fused(hypotheses, keypoints, confidence, intrinsics)
    expected = reference.hypothesis_statistics(hypotheses.double(), keypoints, confidence, intrinsics)
    torch.testing.assert_close(actual[3].double(), expected[3], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1e10, 1e19, 1e30])
def test_one_joint_diverged(size, device):
    """A hypothesis that diverged has weight 0 and does not change the mean of the others."""
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (3, 10, 17), device=device)
    keypoints, confidence[:] = keypoints.nan_to_num(500.0), 1.0
    hypotheses[:, 4, 3, 2] = size
    inputs = hypotheses, keypoints, confidence, intrinsics
    actual = fused(*inputs, temperature=1e-3)  # otherwise its weight of 1e-30 would move the mean
    expected = fused(*(tensor.double() for tensor in inputs), temperature=1e-3, backend="torch")
    for value, truth in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=2e-4)


def test_nothing_to_place(device):
    """No keypoint, one keypoint, all at one point, an unusable row: all hypotheses have the same weight."""
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (4, 5, 17), device=device)
    confidence[0] = 0.0
    confidence[1] = torch.nn.functional.one_hot(torch.tensor(3), 17)
    keypoints[1, 3] = 100.0
    confidence[2], keypoints[2] = 1.0, 250.0
    hypotheses[3] = torch.nan
    mean, covariance, weights, weighted = fused(hypotheses, keypoints, confidence, intrinsics)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))
    torch.testing.assert_close(weighted[:3], mean[:3])
    assert bool(weighted[3].isnan().all()) and bool(mean[3].isnan().all()) and bool(covariance[3].isnan().all())


def test_nan_stays_in_its_frame_and_joint(device):
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (3, 5, 17), device=device)
    keypoints = torch.where(confidence.unsqueeze(-1) > 0, keypoints, torch.nan)  # missing keypoints are never read
    clean = fused(hypotheses, keypoints, confidence, intrinsics)
    assert all(bool(result.isfinite().all()) for result in clean)
    hypotheses[1, 2, 4] = torch.nan
    mean, covariance, _, _ = broken = fused(hypotheses, keypoints, confidence, intrinsics)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(broken, clean, strict=True))
    others = [joint for joint in range(17) if joint != 4]
    assert torch.equal(mean[1, others], clean[0][1, others]) and torch.equal(covariance[1, others], clean[1][1, others])
    assert bool(mean[1, 4].isnan().all()) and bool(covariance[1, 4].isnan().all())


def test_behind_the_camera(device):
    """A hypothesis with a joint behind the camera has weight 0."""
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (2, 4, 17), device=device)
    confidence[:] = 1.0
    keypoints = keypoints.nan_to_num(500.0)
    hypotheses[:, 1, 5, 2] = -50.0
    _, _, weights, weighted = fused(hypotheses, keypoints, confidence, intrinsics)
    expected = reference.hypothesis_statistics(hypotheses.double(), keypoints, confidence, intrinsics)
    assert weights[:, 1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights.double(), expected[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(weighted.double(), expected[3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.01, 1e-4])
@pytest.mark.parametrize("order", ["best last", "best first"])
def test_costs_in_any_order(order, temperature, device):
    """The earlier sums are rescaled, however much better the next hypothesis fits."""
    hypotheses, *view = make_inputs("hypothesis_statistics", (3, 40, 17), device=device)
    hypotheses += torch.linspace(0.0, 1.0, 40, device=device)[:, None, None] * torch.randn(3, 40, 17, 3, device=device)
    if order == "best last":
        hypotheses = hypotheses.flip(1).contiguous()
    actual = fused(hypotheses, *view, temperature=temperature)
    expected = fused(*(x.double() for x in (hypotheses, *view)), temperature=temperature, backend="torch")
    assert float(expected[2].max()) > 0.1 > 1e-10 > float(expected[2].min())
    for value, truth in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-3 if temperature == 1e-4 else 2e-5)


def test_some_cannot_be_placed(device):
    """One is NaN, the others lie behind the camera: all have the same weight, and the others move to their rays."""
    hypotheses, *view = make_inputs("hypothesis_statistics", (3, 6, 17), device=device)
    hypotheses[1, :, 2, 2] -= 100.0
    hypotheses[1, 3, 4] = torch.nan
    hypotheses[2, 1, 0] = torch.inf
    results = fused(hypotheses, *view)
    expected = reference.hypothesis_statistics(hypotheses.double(), *view)
    for value, truth in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 0.02), (1.0, 1e-4), (0.5, float("inf")), (0.3, 0.5)])
def test_settings(weight, temperature, device):
    inputs = make_inputs("hypothesis_statistics", (3, 9, 17), device=device)
    actual = fused(*inputs, weight=weight, temperature=temperature)
    expected = fused(*(x.double() for x in inputs), weight=weight, temperature=temperature, backend="torch")
    for value, truth in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-3 if temperature == 1e-4 else 2e-5)


def test_shared_camera_strides_and_batch(device):
    """One camera, one per frame, slices, keypoints in float64 and a single frame give the same bits."""
    hypotheses, keypoints, confidence, _ = make_inputs("hypothesis_statistics", (4, 6, 17), device=device)
    camera = K.to(device)
    whole = fused(hypotheses, keypoints, confidence, camera)
    doubled = [torch.stack((tensor, tensor), dim=1)[:, 1] for tensor in (hypotheses, keypoints, confidence)]
    others = [
        fused(hypotheses, keypoints, confidence, camera.expand(4, 3, 3)),
        fused(*doubled, camera),
        fused(hypotheses, keypoints.double(), confidence.double(), camera.double()),
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, whole, strict=True))
    alone = fused(hypotheses[2:3], keypoints[2:3], confidence[2:3], camera)
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, whole, strict=True))


@requires_cpp
def test_same_as_cpp(device):
    inputs = make_inputs("hypothesis_statistics", (3, 10, 17), device=device)
    for a, b in zip(fused(*inputs), fused(*(x.cpu() for x in inputs), backend="cpp"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-5)


def test_opcheck_and_errors(device):
    hypotheses, *view = make_inputs("hypothesis_statistics", (2, 5, 4), device=device)
    op = torch.ops.diffupose.hypothesis_statistics.default
    for given in (view, [None, None, None]):
        assert set(torch.library.opcheck(op, (hypotheses, *given, 0.5, 0.02, "triton")).values()) == {"SUCCESS"}
    with pytest.raises(BackendUnavailableError, match=r"Triton kernel takes float32, got torch\.float64"):
        fused(hypotheses.double())
    with pytest.raises(BackendUnavailableError, match="Triton kernel has no gradient"):
        fused(hypotheses.clone().requires_grad_())
    with pytest.raises(BackendUnavailableError, match="Triton kernel takes 640 joints at most, got 641"):
        fused(hypotheses.new_zeros(1, 4, 641, 3))
