"""The modulated graph convolution: hand-made values, parity of outputs and gradients, autocast, errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend
from diffupose.ops import _graph_conv_passes as passes
from diffupose.reference.modulated_graph_conv import modulated_graph_conv_backward
from diffupose.testing import assert_parity, make_inputs, requires_cpp, shape_id

ISAS = _backend.cpp().usable_isas() if ops.available_backends()["cpp"][0] else ["none"]
ODD = [(1, 1, 1, 1), (0, 17, 3, 5), (33, 17, 3, 129), (1, 16, 129, 3), (33, 15, 1, 384), (70, 17, 384, 16)]


def named(backend):
    return lambda *inputs: ops.modulated_graph_conv(*inputs, backend=backend)


@pytest.fixture(params=["torch", pytest.param("cpp", marks=requires_cpp), "cuda"])
def fused(request, device):
    if request.param == "cpp" and device.type != "cpu":
        pytest.skip("C++ runs on the CPU")
    if request.param == "cuda":
        request.getfixturevalue("with_cuda")
    return named(request.param)


def test_known_values(fused, device):
    """Two poses of two joints, one channel in and two out."""
    x = torch.tensor([[[1.0], [2.0]], [[0.0], [-1.0]]], device=device)
    weight = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]], device=device)
    modulation = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    adjacency = torch.tensor([[2.0, 5.0], [7.0, -1.0]], device=device)
    bias = torch.tensor([10.0, 20.0], device=device)
    # Pose 0: x W0 = (1, 2), (2, 4); x W1 = (3, -1), (6, -2); times M: (1, 4), (6, 16) and (3, -2), (18, -8).
    first = [[2 * 1 + 5 * 18, 2 * 4 + 5 * -8], [-1 * 6 + 7 * 3, -1 * 16 + 7 * -2]]
    # Pose 1: only joint 1 is not 0, with the features of pose 0's times -1/2.
    second = [[5 * -9, 5 * 4], [-1 * -3, -1 * -8]]
    expected = torch.tensor([first, second], dtype=torch.float32, device=device)
    assert torch.equal(fused(x, weight, modulation, adjacency), expected)
    assert torch.equal(fused(x, weight, modulation, adjacency, bias), expected + bias)


def test_closed_form_gradient():
    inputs = make_inputs("modulated_graph_conv", (5, 4, 3, 6), dtype=torch.float64, requires_grad=True)
    out = reference.modulated_graph_conv(*inputs)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad_out)
    for grad, truth in zip(modulated_graph_conv_backward(grad_out, *inputs[:4]), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=1e-12)


@requires_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    # A single number in bfloat16 is no test: the reference's rounding errors may cancel by chance.
    [(shape, torch.float32) for shape in ODD] + [(shape, torch.bfloat16) for shape in ODD[1:]],
    ids=shape_id,
)
def test_parity(shape, dtype, isa, monkeypatch):
    monkeypatch.setenv("DIFFUPOSE_ISA", isa)
    inputs = make_inputs("modulated_graph_conv", shape, dtype=dtype, requires_grad=True)
    assert_parity(named("cpp"), reference.modulated_graph_conv, inputs)
    assert_parity(named("cpp"), reference.modulated_graph_conv, inputs[:4])


# C++ is tested above in every instruction set. What the compiler knows (17, 16 and 15 joints, channels in fours) and
# what it does not; more poses than a part of the sums has.
CUDA = [*ODD, (33, 16, 5, 24), (9, 15, 4, 260), (3, 64, 2, 40), (2, 17, 3, 384)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for dtype in FLOATS for shape in (CUDA if dtype == torch.float32 else CUDA[1:])],
    ids=shape_id,
)
def test_parity_cuda(with_cuda, shape, dtype, device):
    inputs = make_inputs("modulated_graph_conv", shape, dtype=dtype, device=device, requires_grad=True)
    assert_parity(named("cuda"), reference.modulated_graph_conv, inputs)
    assert_parity(named("cuda"), reference.modulated_graph_conv, inputs[:4])


@requires_cpp
def test_parity_where_products_are_torch_mm(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inputs = make_inputs("modulated_graph_conv", (33, 17, 5, 20), requires_grad=True)
    assert_parity(named("cpp"), reference.modulated_graph_conv, inputs)


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16], ids=shape_id)
@pytest.mark.parametrize("shape", [(33, 17, 64, 48), (2, 16, 3, 129)], ids=shape_id)
def test_autocast(kernel_backend, shape, product, device):
    """As exact as the reference under autocast, in the same dtypes: only the product is in 16 bits."""
    if kernel_backend == "cpp" and product == torch.float16:
        pytest.skip("C++ has no float16")
    inputs = make_inputs("modulated_graph_conv", shape, device=device, requires_grad=True)
    grad_out = torch.randn(*shape[:2], shape[3]).to(device)

    def run(backend, dtype=torch.float32):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        with torch.autocast(device.type, product, enabled=dtype == torch.float32):
            out = ops.modulated_graph_conv(*leaves, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    exact, baseline, actual = run("torch", torch.float64), run("torch"), run(kernel_backend)
    for value, other, truth in zip(actual, baseline, exact, strict=True):
        assert value.dtype == other.dtype == torch.float32
        bound = 2 * (other - truth).abs().max() + 1e-3 * truth.abs().max()
        assert bool((value - truth).abs().max() <= bound)


def test_gradcheck(device):
    """``auto`` takes the reference in float64, even if C++ is available."""
    inputs = make_inputs("modulated_graph_conv", (2, 3, 2, 4), dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.modulated_graph_conv, inputs)
    assert torch.autograd.gradgradcheck(ops.modulated_graph_conv, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=shape_id)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(kernel_backend, bias, dtype, device):
    if kernel_backend == "cpp" and dtype == torch.float16:
        pytest.skip("C++ has no float16")
    inputs = make_inputs("modulated_graph_conv", (5, 3, 4, 6, bias), dtype=dtype, device=device)
    x, weight, modulation, adjacency, *rest = inputs
    modulation = modulation.float()  # as under autocast
    arguments = x, weight, modulation, adjacency.float()
    forward, backward = (
        torch.ops.diffupose.modulated_graph_conv_fwd.default,
        torch.ops.diffupose.modulated_graph_conv_bwd.default,
    )
    results = torch.library.opcheck(forward, (*arguments, rest[0].float() if rest else None, kernel_backend))
    out, hidden = forward(*arguments, None, kernel_backend)
    more = torch.library.opcheck(backward, (torch.randn_like(out), *arguments, hidden, bias, kernel_backend))
    assert set(results.values()) | set(more.values()) == {"SUCCESS"}


class Recorded(TorchDispatchMode):
    """Records the names of the dispatched ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_modes_see_the_raw_ops(kernel_backend, autocast, device):
    """Eager mode does not call the raw ops, and has the same result."""
    inputs = make_inputs("modulated_graph_conv", (9, 17, 8, 24), device=device, requires_grad=True)

    def run():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = named(kernel_backend)(*inputs)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    with Recorded() as recorded:
        traced = run()
    raw = [name for name in recorded.names if "diffupose" in name]
    assert raw == [f"diffupose.modulated_graph_conv_{name}.default" for name in ("fwd", "bwd")]
    for value, expected in zip(run(), traced, strict=True):
        assert value.dtype == expected.dtype and value.stride() == expected.stride()
        # Under autocast a gradient's product may come in float32.
        tolerance = 1e-2 if autocast else 1e-5
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_fake_tensors(kernel_backend, device):
    with FakeTensorMode():
        inputs = make_inputs("modulated_graph_conv", (9, 17, 8, 24), device=device, requires_grad=True)
        out = named(kernel_backend)(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert [grad.shape for grad in grads] == [value.shape for value in inputs]


def test_compile(kernel_backend, device):
    inputs = make_inputs("modulated_graph_conv", (33, 17, 8, 24), device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Dynamo detected")  # of code that it cannot trace
        assert_parity(torch.compile(named(kernel_backend), fullgraph=True), reference.modulated_graph_conv, inputs)


@requires_cpp
def test_sums_do_not_depend_on_threads_or_batch(monkeypatch):
    """Given the product, one part, several parts and a single pose give the same bits."""
    x, weight, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (100, 17, 8, 72))
    backward = torch.ops.diffupose.modulated_graph_conv_bwd.default
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, hidden = torch.ops.diffupose.modulated_graph_conv_fwd.default(x, weight, modulation, adjacency, bias)
        grad_out = torch.randn_like(out)
        single = backward(grad_out, x, weight, modulation, adjacency, hidden, False)
        torch.set_num_threads(3)
        # Only the fused pass is compared: the rounding of a product may depend on threads and shape.
        monkeypatch.setattr(passes, "multiply", lambda a, b: hidden.flatten(0, 1))
        again, _ = torch.ops.diffupose.modulated_graph_conv_fwd.default(x, weight, modulation, adjacency, bias)
        monkeypatch.undo()
        several = backward(grad_out, x, weight, modulation, adjacency, hidden, False)
        monkeypatch.setattr(passes, "multiply", lambda a, b: hidden[7])
        alone, _ = torch.ops.diffupose.modulated_graph_conv_fwd.default(x[7:8], weight, modulation, adjacency, bias)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, out) and torch.equal(alone[0], out[7])
    assert all(torch.equal(a, b) for a, b in zip(single[2:], several[2:], strict=True))


def cuda_pass(hidden, modulation, adjacency, bias, dtype):
    """Run only what follows the product ``[N, J, 2 C]``."""
    out = hidden.new_full((*hidden.shape[:2], hidden.shape[2] // 2), torch.nan, dtype=dtype)
    passes.FORWARD["cuda"](hidden, modulation, adjacency, bias, out)
    return out


@pytest.mark.parametrize("shape", [(5, 17, 24), (3, 16, 12), (2, 15, 33), (9, 20, 4)], ids=shape_id)
def test_cuda_gives_equal_bits(with_cuda, shape, device):
    """A second run and a single pose give the same bits; unaligned arrays, one channel per thread, nearly the same."""
    poses, joints, channels = shape
    _, _, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (1, joints, 1, channels), device=device)
    hidden, grad_out = torch.randn(poses, joints, 2 * channels), torch.randn(poses, joints, channels)
    hidden, grad_out = hidden.to(device), grad_out.to(device)
    out = cuda_pass(hidden, modulation, adjacency, bias, torch.float32)
    assert torch.equal(cuda_pass(hidden, modulation, adjacency, bias, torch.float32), out)
    assert torch.equal(cuda_pass(hidden[1:2], modulation, adjacency, bias, torch.float32)[0], out[1])
    shifted = torch.cat((hidden.new_zeros(1), hidden.flatten()))[1:].view_as(hidden)
    assert shifted.data_ptr() % 16 != 0
    torch.testing.assert_close(cuda_pass(shifted, modulation, adjacency, bias, torch.float32), out)

    first = passes.BACKWARD["cuda"](grad_out, hidden, modulation, adjacency)
    again = passes.BACKWARD["cuda"](grad_out, hidden, modulation, adjacency)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    other = passes.BACKWARD["cuda"](grad_out, shifted, modulation, adjacency)
    for value, expected in zip(other, first, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 17, 24), (3, 16, 12), (4, 15, 8), (2, 3, 7)], ids=shape_id)
def test_cuda_rounds_once(with_cuda, shape, dtypes, device):
    """All is computed in float32 from the stored numbers and rounded once."""
    poses, joints, channels = shape
    _, _, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (1, joints, 1, channels), device=device)
    hidden = torch.randn(poses, joints, 2 * channels).to(device, dtypes[0])
    out = cuda_pass(hidden, modulation, adjacency, bias, dtypes[1])
    own, neighbors = hidden.double().chunk(2, dim=-1)
    factors, edges = modulation.double(), adjacency.double()
    diagonal = torch.diagonal(edges)
    truth = diagonal.unsqueeze(-1) * factors * own + (edges - torch.diag(diagonal)) @ (factors * neighbors) + bias
    bound = 2e-6 * truth.abs().max() + 0.51 * torch.finfo(dtypes[1]).eps * truth.abs()
    assert bool(((out.double() - truth).abs() <= bound).all())


def test_null_pointers_are_rejected(with_cuda, device):
    """So are dtypes and sizes without a kernel."""
    _, _, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (1, 3, 1, 5), device=device)
    hidden, out = torch.randn(2, 3, 10).to(device), torch.empty(2, 3, 5).to(device)
    extension = _backend.cuda()
    forward = {
        "hidden": hidden, "dtype": "float32", "modulation": modulation, "adjacency": adjacency, "bias": bias,
        "out": out, "out_dtype": "float32",
    }  # fmt: skip
    backward = {
        "grad_out": out, "out_dtype": "float32", "hidden": hidden, "dtype": "float32", "modulation": modulation,
        "adjacency": adjacency, "grad_hidden": hidden.clone(), "grad_modulation": modulation.clone(),
        "grad_adjacency": adjacency.clone(), "grad_bias": bias.clone(),
        "workspace": torch.empty(extension.modulated_graph_conv_bwd_workspace(num_poses=2, num_joints=3, channels=5)),
    }  # fmt: skip
    backward["workspace"] = backward["workspace"].to(device)
    for run, arguments in (
        (extension.modulated_graph_conv_fwd, forward),
        (extension.modulated_graph_conv_bwd, backward),
    ):
        sizes = {"num_poses": 2, "num_joints": 3, "channels": 5, "stream": _backend.stream_of(hidden)}
        pointers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} | sizes
        run(**pointers)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and name != "bias":
                with pytest.raises(ValueError, match=f"{name} is a null pointer"):
                    run(**(pointers | {name: 0}))
        with pytest.raises(ValueError, match="out must have the storage of hidden, or float32"):
            run(**(pointers | {"out_dtype": "float16"}))
        with pytest.raises(ValueError, match=r"num_joints must lie in \[1, 64\]"):
            run(**(pointers | {"num_joints": 65}))


@pytest.mark.parametrize(("num_joints", "channels"), [(1, 1), (15, 3), (16, 129), (17, 384), (64, 5), (65, 5)])
@pytest.mark.parametrize("num_poses", [0, 1, 33])
def test_edges(num_poses, num_joints, channels, device):
    """Slices of larger tensors, transposed and expanded tensors, on the backend of ``auto``."""
    wide = make_inputs("modulated_graph_conv", (num_poses, num_joints, 4, channels), device=device)
    sliced = [torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0] for tensor in wide]
    sliced[3] = sliced[3].T.contiguous().T
    expected = [tensor.clone().requires_grad_() for tensor in wide]
    actual = [tensor.requires_grad_() for tensor in sliced]
    weights = torch.randn(channels, device=device)
    results = []
    for function, leaves in ((reference.modulated_graph_conv, expected), (ops.modulated_graph_conv, actual)):
        out = function(*leaves)
        assert out.shape == (num_poses, num_joints, channels)
        # The gradient of this sum is an expanded tensor.
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for value, truth in zip(results[1], results[0], strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6 + 1e-5 * scale)


def test_unused_gradients(kernel_backend, device):
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 6), device=device)
    inputs[2].requires_grad_()
    (grad,) = torch.autograd.grad(named(kernel_backend)(*inputs).sum(), inputs[2:3])
    (expected,) = torch.autograd.grad(reference.modulated_graph_conv(*inputs).sum(), inputs[2:3])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("wanted", range(5))
def test_products_without_use_are_left_out(kernel_backend, wanted, device, monkeypatch):
    """Forward takes one product, the gradients of x and weight one each, the other gradients none."""
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 6), device=device)
    inputs[wanted].requires_grad_()
    calls, multiply = [], passes.multiply
    monkeypatch.setattr(passes, "multiply", lambda a, b: calls.append(a) or multiply(a, b))
    out = named(kernel_backend)(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[wanted])
    assert len(calls) == (2 if wanted < 2 else 1)
    (expected,) = torch.autograd.grad(reference.modulated_graph_conv(*inputs).square().sum(), inputs[wanted])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("changed", range(4))
def test_inputs_must_stay_as_they_were(kernel_backend, changed, device):
    """Inputs must not change between both passes, as in PyTorch. Weights are copied, and so is x if it is cast."""
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 6), device=device, requires_grad=True)
    expected = torch.autograd.grad(named(kernel_backend)(*inputs).sum(), inputs)
    out = named(kernel_backend)(*inputs)
    with torch.no_grad():
        inputs[changed].zero_()
    if changed == 1:
        for grad, truth in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
            assert torch.equal(grad, truth)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), inputs)


def test_nan_stays_in_its_pose(fused, device):
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 21), device=device)
    clean = fused(*inputs)
    inputs[0][1, 2] = torch.nan
    out = fused(*inputs)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert bool(out[1].isnan().all())


X, WEIGHT, MODULATION, ADJACENCY, BIAS = make_inputs("modulated_graph_conv", (2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x must have shape \[N, J, C_in\], got \(3, 4\)"),
        ({"weight": WEIGHT[:, :3]}, r"weight must have shape \[2, 4, C_out\], got \(2, 3, 5\)"),
        ({"weight": WEIGHT[0]}, "weight must have shape"),
        ({"weight": WEIGHT.double()}, r"weight must have the dtype of x, torch\.float32, got torch\.float64"),
        ({"weight": WEIGHT.int()}, r"weight must be a floating-point tensor, got torch\.int32"),
        ({"modulation": MODULATION[:2]}, r"modulation must have shape \[3, 5\], got \(2, 5\)"),
        ({"adjacency": ADJACENCY[:2]}, r"adjacency must have shape \[3, 3\], got \(2, 3\)"),
        ({"bias": BIAS[:4]}, r"bias must have shape \[5\], got \(4,\)"),
        ({"bias": BIAS.to("meta")}, "bias must be on the device of x, cpu, got meta"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
)
def test_errors(change, message):
    arguments = {"x": X, "weight": WEIGHT, "modulation": MODULATION, "adjacency": ADJACENCY, "bias": BIAS} | change
    with pytest.raises(ValueError, match=message):
        ops.modulated_graph_conv(**arguments)


def test_what_fused_code_does_not_take(kernel_backend, device):
    fused, floats = named(kernel_backend), [tensor.to(device) for tensor in (X, WEIGHT, MODULATION, ADJACENCY)]
    x, weight, modulation, adjacency = floats
    code = {"cpp": r"C\+\+ code takes float32 and bfloat16", "cuda": "CUDA code takes float32, float16 and bfloat16"}
    with pytest.raises(BackendUnavailableError, match=code[kernel_backend] + r", got torch\.float64"):
        fused(*(tensor.double() for tensor in floats))
    with pytest.raises(BackendUnavailableError, match="takes 64 joints at most, got 65"):
        fused(*make_inputs("modulated_graph_conv", (1, 65, 2, 2), device=device))
    with pytest.raises(BackendUnavailableError, match="all in float32 or all in float32, got float64, float32"):
        fused(x, weight, modulation.double(), adjacency)
    with pytest.raises(BackendUnavailableError, match="at least one joint and one channel"):
        fused(x[..., :0], weight[:, :0], modulation, adjacency)
    inputs = make_inputs("modulated_graph_conv", (2, 3, 4, 5), device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(fused(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_channels():
    assert ops.modulated_graph_conv(X[..., :0], WEIGHT[:, :0], MODULATION, ADJACENCY).shape == (2, 3, 5)


def test_meta_device():
    """A device without autocast, whose only backend is the reference."""
    assert ops.modulated_graph_conv(*(x.to("meta") for x in (X, WEIGHT, MODULATION, ADJACENCY))).shape == (2, 3, 5)


def test_unavailable_backend():
    with pytest.raises(BackendUnavailableError, match='backend "cuda" is not available'):
        ops.modulated_graph_conv(X, WEIGHT, MODULATION, ADJACENCY, backend="cuda")
