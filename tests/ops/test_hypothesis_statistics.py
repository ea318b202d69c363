"""Mean, covariance, reprojection weights and weighted mean: hand-made values, parity, missing joints, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend, _common
from diffupose.testing import assert_parity, make_inputs, requires_cpp, shape_id

ISAS = _backend.cpp().usable_isas() if ops.available_backends()["cpp"][0] else ["none"]
K = torch.tensor([[1000.0, 0.0, 500.0], [0.0, 1100.0, 400.0], [0.0, 0.0, 1.0]])


def named(backend, **options):
    def run(hypotheses, keypoints_2d=None, confidence=None, intrinsics=None):
        view = {"keypoints_2d": keypoints_2d, "confidence": confidence, "intrinsics": intrinsics}
        results = ops.hypothesis_statistics(hypotheses, **view, **options, backend=backend)
        return tuple(hypotheses.new_empty(0) if result is None else result for result in results)

    return run


@pytest.fixture(params=["torch", pytest.param("cpp", marks=requires_cpp), "cuda"])
def fused(request, device):
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("C++ runs on the CPU")
    if request.param == "cuda":
        request.getfixturevalue("with_cuda")
    return lambda *inputs, **options: named(request.param, **options)(*inputs)


def test_known_moments(fused, device):
    """Four corners of a cube around (10, 20, 30), and a joint that moves only along x = -z."""
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    line = torch.tensor([[3.0, 0, -3], [-1, 0, 1], [-1, 0, 1], [-1, 0, 1]])
    hypotheses = torch.stack((corners + torch.tensor([10.0, 20, 30]), line), dim=1)[None].to(device)  # [1, 4, 2, 3]
    mean, covariance, _, _ = fused(hypotheses)
    assert mean[0].tolist() == [[10, 20, 30], [0, 0, 0]]
    expected = torch.stack((torch.eye(3) * 4 / 3, torch.tensor([[4.0, 0, -4], [0, 0, 0], [-4, 0, 4]])))
    torch.testing.assert_close(covariance[0].cpu(), expected)
    few = fused(hypotheses[:, :3])
    assert bool(few[0].isfinite().all()) and bool(few[1].isnan().all())


def test_known_weights(fused, device):
    """Two points can always be placed exactly. With a third, errors in pixels give the weights."""
    good, bad = [[0.0, 0, 0], [0.5, 0, 0]], [[0.0, 0, 0], [0.5, 0, 1.0]]
    hypotheses = torch.tensor([[good, bad]], device=device)
    keypoints = torch.tensor([[[500.0, 400.0], [750.0, 400.0]]], device=device)  # z = 2 m: 250 pixels apart
    confidence = torch.ones(1, 2, device=device)
    # Both hypotheses project exactly, each from its own root.
    _, _, weights, mean = fused(hypotheses, keypoints, confidence, K.to(device), weight=0.0)
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(mean.cpu(), torch.tensor([[[0.0, 0, 0], [0.5, 0, 0.5]]]), rtol=0, atol=1e-3)
    # The third keypoint fits the first hypothesis: the errors give the expected weights.
    third = torch.tensor([[[[0.0, 1.0, 0.0]], [[0.0, -1.0, 0.0]]]], device=device)
    hypotheses = torch.cat((hypotheses, third), dim=2)
    keypoints = torch.cat((keypoints, torch.tensor([[[500.0, 950.0]]], device=device)), dim=1)
    view = keypoints, torch.ones(1, 3, device=device), K.to(device)
    _, _, weights, mean = fused(hypotheses, *view, weight=0.0, temperature=0.1)
    error, _ = reference.hypothesis_statistics.__globals__["reprojection_error"](hypotheses, *view)
    assert float(error[0, 0]) < 1e-3 < 10.0 < float(error[0, 1])
    expected = torch.exp(-error[0] / (0.1 * 550.0))  # the box is 250 x 550 pixels
    torch.testing.assert_close(weights[0], expected / expected.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean[0], (weights[0, :, None, None] * hypotheses[0]).sum(dim=0))


ODD = [(1, 1, 1), (0, 3, 17), (33, 4, 15), (1, 33, 16), (5, 10, 17), (3, 300, 2)]


def check_parity(backend, shape, device):
    """The covariance of few hypotheses is NaN in any dtype. It is compared separately."""

    def moments_only(function):
        return lambda hypotheses: function(hypotheses)[: 1 if shape[1] < 4 else 2]

    inputs = make_inputs("hypothesis_statistics", shape, device=device)
    assert_parity(moments_only(named(backend)), moments_only(reference.hypothesis_statistics), inputs[:1])
    if shape[2] == 1:
        return  # a single joint cannot be placed: see test_nothing_to_place

    def weighted(function):
        return lambda h, k, c, i: function(h, k, c, i)[2:]

    assert_parity(weighted(named(backend)), weighted(reference.hypothesis_statistics), inputs)
    assert bool(named(backend)(*inputs)[1].isnan().all()) == (shape[1] < 4)


@requires_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ODD, ids=shape_id)
def test_parity(shape, isa, monkeypatch):
    monkeypatch.setenv("DIFFUPOSE_ISA", isa)
    check_parity("cpp", shape, "cpu")


# The most joints; more hypotheses than threads; more than fit shared memory, by a few and by far.
@pytest.mark.parametrize("shape", [*ODD, (2, 5, 64), (1, 1100, 3), (1, 450, 17), (1, 1100, 17)], ids=shape_id)
def test_parity_cuda(with_cuda, shape, device):
    check_parity("cuda", shape, device)


def test_far_from_zero(kernel_backend, device):
    """Hypotheses hundreds of metres away with a spread of centimetres give results as exact as the reference."""
    (hypotheses,) = make_inputs("hypothesis_statistics", (3, 50, 17, False), device=device)
    hypotheses = hypotheses + torch.tensor([300.0, -200.0, 1000.0], device=device)
    assert_parity(
        lambda h: named(kernel_backend)(h)[:2],
        lambda hypotheses: reference.hypothesis_statistics(hypotheses)[:2],
        [hypotheses],
    )
    exact = torch.stack([torch.cov(hypotheses[0, :, j].double().T) for j in range(17)])
    covariance = named(kernel_backend)(hypotheses)[1][0]
    torch.testing.assert_close(covariance.double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("count", [10, 50, 300])
def test_first_hypotheses_far_from_the_rest(kernel_backend, count, device):
    """The first hypotheses lie 200 standard deviations away: the origin of the sums must not come from them alone."""
    (hypotheses,) = make_inputs("hypothesis_statistics", (3, count, 5, False), device=device)
    hypotheses[:, :8] += 10.0
    covariance = named(kernel_backend)(hypotheses)[1]
    exact = torch.stack([torch.stack([torch.cov(frame[:, j].double().T) for j in range(5)]) for frame in hypotheses])
    torch.testing.assert_close(covariance.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("joints", [16, 17])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_hypotheses_may_begin_anywhere(kernel_backend, offset, joints, device):
    """A view that does not begin at a multiple of 16 bytes gives the same bits."""
    hypotheses, *view = make_inputs("hypothesis_statistics", (9, 10, joints), device=device)
    memory = torch.empty(hypotheses.numel() + offset, device=device)
    moved = memory[offset:].view_as(hypotheses).copy_(hypotheses)
    assert moved.is_contiguous() and moved.data_ptr() == memory.data_ptr() + 4 * offset
    for a, b in zip(named(kernel_backend)(moved, *view), named(kernel_backend)(hypotheses, *view), strict=True):
        assert torch.equal(a, b)


def test_some_cannot_be_placed(fused, device):
    """One is NaN, the others lie behind the camera: all have the same weight, and the others move to their rays."""
    hypotheses, *view = make_inputs("hypothesis_statistics", (3, 6, 17), device=device)
    hypotheses[1, :, 2, 2] -= 100.0
    hypotheses[1, 3, 4] = torch.nan
    hypotheses[2, 1, 0] = torch.inf
    results = fused(hypotheses, *view)
    expected = reference.hypothesis_statistics(hypotheses.double(), *view)
    for value, truth in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("count", [10, 60])
def test_one_infinite_hypothesis(fused, device, count):
    """The mean is infinite, too, or NaN if it is the first hypothesis: differences are taken from that one."""
    (hypotheses,) = make_inputs("hypothesis_statistics", (count, count, 3, False), device=device)
    for i in range(count):
        hypotheses[i, i, 1, 2] = -torch.inf
    mean, covariance, _, _ = fused(hypotheses)
    expected = reference.hypothesis_statistics(hypotheses)
    torch.testing.assert_close(mean, expected[0], equal_nan=True)
    assert torch.equal(covariance.isfinite(), expected[1].isfinite())


def test_equal_hypotheses(fused, device):
    pose = torch.randn(2, 1, 17, 3, device=device)
    mean, covariance, _, _ = fused(pose.repeat(1, 7, 1, 1))
    assert torch.equal(mean, pose.squeeze(1))
    assert float(covariance.abs().max()) == 0.0


def test_nothing_to_place(fused, device):
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


def test_behind_the_camera(fused, device):
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


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 0.02), (1.0, 1e-4), (0.5, float("inf")), (0.3, 0.5)])
def test_settings(kernel_backend, weight, temperature, device):
    inputs = make_inputs("hypothesis_statistics", (6, 9, 17), device=device)
    actual = named(kernel_backend, weight=weight, temperature=temperature)(*inputs)
    expected = named("torch", weight=weight, temperature=temperature)(*(tensor.double() for tensor in inputs))
    for value, truth in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-3 if temperature == 1e-4 else 2e-5)


def test_auto_leaves_the_view_to_others(with_cuda, device, monkeypatch):
    """CUDA code has mean and covariance only: ``auto`` takes it without keypoints, a name takes it always."""
    monkeypatch.setattr(_backend, "_AUTO_ORDER", {device.type: ("cuda", "torch")})
    hypotheses, *view = make_inputs("hypothesis_statistics", (3, 6, 17), device=device)
    run, shapes = _backend.cuda().hypothesis_statistics, []
    recorder = SimpleNamespace(hypothesis_statistics=lambda **rest: (shapes.append(rest["num_joints"]), run(**rest)))
    monkeypatch.setattr(_common, "cuda", lambda: recorder)
    named("auto")(hypotheses)
    assert shapes == [17]
    results = named("auto")(hypotheses, *view)
    assert shapes == [17]
    assert all(torch.equal(a, b) for a, b in zip(results, named("torch")(hypotheses, *view), strict=True))
    named("cuda")(hypotheses, *view)
    assert shapes == [17, 17]


def test_shared_camera_strides_and_threads(kernel_backend, device):
    """One camera, one per frame, slices, a single frame and any number of threads give the same bits."""
    fused, camera = named(kernel_backend), K.to(device)
    hypotheses, keypoints, confidence, _ = make_inputs("hypothesis_statistics", (40, 20, 17), device=device)
    whole = fused(hypotheses, keypoints, confidence, camera)
    doubled = [torch.stack((tensor, tensor), dim=1)[:, 1] for tensor in (hypotheses, keypoints, confidence)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        others = [
            fused(hypotheses, keypoints, confidence, camera.expand(40, 3, 3)),
            fused(*doubled, camera),
            fused(hypotheses.transpose(1, 2).contiguous().transpose(1, 2), keypoints, confidence, camera),
        ]
        torch.set_num_threads(1)
        others.append(fused(hypotheses, keypoints, confidence, camera))
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, whole, strict=True))
    alone = fused(hypotheses[7:8], keypoints[7:8], confidence[7:8], camera)
    # With a view the last two are PyTorch's there, whose bits on a GPU may depend on the batch.
    same = 2 if kernel_backend == "cuda" and device.type == "cuda" else 4
    assert all(torch.equal(a[0], b[7]) for a, b in list(zip(alone, whole, strict=True))[:same])
    doubles = fused(hypotheses, keypoints.double(), confidence.double(), camera.double())
    assert all(torch.equal(a, b) for a, b in zip(doubles, whole, strict=True))


def test_gradcheck():
    """The reference has a gradient; ``auto`` takes it if a gradient is needed."""
    inputs = make_inputs("hypothesis_statistics", (1, 4, 3), dtype=torch.float64)
    hypotheses, view = inputs[0].requires_grad_(), inputs[1:]
    assert torch.autograd.gradcheck(lambda h: named("auto")(h, *view), hypotheses)
    single = inputs[0].detach().float().requires_grad_()
    named("auto")(single)[0].sum().backward()
    assert single.grad is not None


def test_opcheck(kernel_backend, device):
    hypotheses, *view = make_inputs("hypothesis_statistics", (3, 5, 4), device=device)
    op = torch.ops.diffupose.hypothesis_statistics.default
    for given in (view, [None, None, None]):
        arguments = (hypotheses, *given, 0.5, 0.02, kernel_backend)
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_compile(kernel_backend, device):
    inputs = make_inputs("hypothesis_statistics", (3, 5, 4), device=device)
    compiled = torch.compile(named(kernel_backend), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), named(kernel_backend)(*inputs), strict=True))


HYPOTHESES, KEYPOINTS, CONFIDENCE, INTRINSICS = make_inputs("hypothesis_statistics", (2, 5, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hypotheses": HYPOTHESES[0]}, r"hypotheses must have shape \[B, H, J, 3\] with H and J at least 1"),
        ({"hypotheses": HYPOTHESES[:, :0]}, "hypotheses must have shape"),
        ({"hypotheses": HYPOTHESES.half()}, r"hypotheses must be float32 or float64, got torch\.float16"),
        ({"keypoints_2d": KEYPOINTS[..., :1]}, r"keypoints_2d must have shape \[2, 4, 2\], got \(2, 4, 1\)"),
        ({"confidence": CONFIDENCE[:1]}, r"confidence must have shape \[2, 4\], got \(1, 4\)"),
        ({"intrinsics": INTRINSICS[:1]}, r"intrinsics must have shape \[2, 3, 3\] or \[3, 3\], got \(1, 3, 3\)"),
        ({"intrinsics": None}, "intrinsics must be given with the others of keypoints_2d, confidence, intrinsics"),
        ({"confidence": CONFIDENCE.to("meta")}, "confidence must be on the device of hypotheses, cpu, got meta"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
)
def test_errors(change, message):
    arguments = {"keypoints_2d": KEYPOINTS, "confidence": CONFIDENCE, "intrinsics": INTRINSICS}
    arguments |= {"hypotheses": HYPOTHESES} | change
    with pytest.raises(ValueError, match=message):
        ops.hypothesis_statistics(arguments.pop("hypotheses"), **arguments)


def test_what_fused_code_does_not_take(kernel_backend, device):
    code, hypotheses = {"cpp": r"C\+\+ code", "cuda": "CUDA code"}[kernel_backend], HYPOTHESES.to(device)
    with pytest.raises(BackendUnavailableError, match=rf"{code} takes float32, got torch\.float64"):
        named(kernel_backend)(hypotheses.double())
    with pytest.raises(BackendUnavailableError, match=f"this op's {code} has no gradient"):
        named(kernel_backend)(hypotheses.clone().requires_grad_())
    view = {
        "keypoints_2d": KEYPOINTS.to(device),
        "confidence": CONFIDENCE.to(device),
        "intrinsics": INTRINSICS.to(device),
    }
    for name, tensor in view.items():
        with pytest.raises(BackendUnavailableError, match=f"this op's {code} has no gradient"):
            named(kernel_backend)(hypotheses, **(view | {name: tensor.clone().requires_grad_()}))


def test_too_many_joints_for_cuda(with_cuda, device):
    (hypotheses,) = make_inputs("hypothesis_statistics", (1, 4, 65, False), device=device)
    with pytest.raises(BackendUnavailableError, match="CUDA code takes 64 joints at most, got 65"):
        named("cuda")(hypotheses)


def test_null_pointers_are_rejected(with_cuda, device):
    (hypotheses,) = make_inputs("hypothesis_statistics", (2, 5, 4, False), device=device)
    tensors = {
        "hypotheses": hypotheses,
        "mean": torch.empty(2, 4, 3, device=device),
        "covariance": torch.empty(2, 4, 3, 3, device=device),
    }
    arguments = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    arguments |= {"num_frames": 2, "num_hypotheses": 5, "num_joints": 4, "stream": _backend.stream_of(hypotheses)}
    run = _backend.cuda().hypothesis_statistics
    run(**arguments)
    for name in tensors:
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            run(**(arguments | {name: 0}))
    with pytest.raises(ValueError, match=r"num_joints must lie in \[1, 64\]"):
        run(**(arguments | {"num_joints": 65}))
