"""The modulated graph convolution in Triton: outputs, gradients, and the epilogue of inference."""

from __future__ import annotations

import pytest
import torch
from support.sweeps import sweep
from torch.nn import functional

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.kernels.modulated_graph_conv import Epilogue, modulated_graph_conv_fwd
from diffupose.testing import assert_parity, make_inputs, shape_id


def fused(*inputs):
    return ops.modulated_graph_conv(*inputs, backend="triton")


ODD = [(1, 1, 1, 1), (0, 17, 3, 5), (3, 17, 3, 129), (1, 16, 129, 3), (2, 15, 1, 384), (33, 4, 3, 20), (2, 64, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # A single number in 16 bits is no test: the reference's rounding errors may cancel by chance.
    [(shape, torch.float32) for shape in ODD]
    + [(shape, dtype) for dtype in (torch.float16, torch.bfloat16) for shape in ODD[1:4]],
    ids=shape_id,
)
def test_parity(shape, dtype, device):
    inputs = make_inputs("modulated_graph_conv", shape, dtype=dtype, device=device, requires_grad=True)
    assert_parity(fused, reference.modulated_graph_conv, inputs)
    assert_parity(fused, reference.modulated_graph_conv, inputs[:4])


def test_an_adjacency_that_is_not_symmetric(device):
    """Both passes agree with autograd of explicit sums in float64. A and its transpose differ."""
    x, weight, modulation, _, bias = make_inputs("modulated_graph_conv", (4, 6, 5, 7), device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, modulation, torch.randn(6, 6, device=device), bias)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]

    def written_out(x, weight, modulation, adjacency, bias):
        rows = []
        for j in range(6):
            row = adjacency[j, j] * modulation[j] * (x[:, j] @ weight[0])
            for i in range(6):
                if i != j:
                    row = row + adjacency[j, i] * modulation[i] * (x[:, i] @ weight[1])
            rows.append(row + bias)
        return torch.stack(rows, dim=1)

    grad_out = torch.randn(4, 6, 7, device=device)
    out, truth = fused(*leaves), written_out(*doubles)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    for value, exact in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(truth, doubles, grad_out.double()), strict=True
    ):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=shape_id)
def test_autocast(dtype, device):
    """As exact as the reference under autocast, in the same dtypes: only the product is in 16 bits."""
    inputs = make_inputs("modulated_graph_conv", (3, 16, 64, 48), requires_grad=True, device=device)
    grad_out = torch.randn(3, 16, 48, device=device)

    def run(backend, exact=False):
        leaves = [tensor.detach().to(torch.float64 if exact else torch.float32).requires_grad_() for tensor in inputs]
        with torch.autocast(device.type, dtype, enabled=not exact):
            out = ops.modulated_graph_conv(*leaves, backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad_out.to(leaves[0].dtype))

    for value, other, truth in zip(run("triton"), run("torch"), run("torch", exact=True), strict=True):
        assert value.dtype == other.dtype == torch.float32
        bound = 2 * (other - truth).abs().max() + 1e-3 * truth.abs().max()
        assert bool((value - truth).abs().max() <= bound)


def test_sums_are_the_same_in_every_run(device):
    """Sums in several parts give the same bits. Given the product, a pose's result does not depend on other poses."""
    inputs = make_inputs("modulated_graph_conv", (50, 5, 3, 20), requires_grad=True, device=device)
    grads = [torch.autograd.grad(fused(*inputs).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    hidden, (modulation, adjacency, bias) = torch.randn(7, 5, 40, device=device), [x.detach() for x in inputs[2:]]
    whole = modulated_graph_conv_fwd(hidden, modulation, adjacency, bias, hidden.new_empty(7, 5, 20))
    alone = modulated_graph_conv_fwd(
        hidden[3:4].contiguous(), modulation, adjacency, bias, hidden.new_empty(1, 5, 20)
    )  # fmt: skip
    assert torch.equal(alone[0], whole[3])


def test_strides(device):
    """Slices of larger tensors, transposed and expanded tensors."""
    wide = make_inputs("modulated_graph_conv", (3, 17, 4, 6), device=device)
    sliced = [torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0] for tensor in wide]
    sliced[3] = sliced[3].T.contiguous().T
    leaves = [[x.clone().requires_grad_() for x in wide], [x.requires_grad_() for x in sliced]]
    weights = torch.randn(6, device=device)
    # The gradient of this sum is an expanded tensor.
    results = [
        (out, *torch.autograd.grad((out * weights).sum(), given))
        for out, given in ((reference.modulated_graph_conv(*leaves[0]), leaves[0]), (fused(*leaves[1]), leaves[1]))
    ]
    for truth, value in zip(*results, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6 + 1e-5 * float(truth.detach().abs().max()))


def test_unused_gradients(device):
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 6), device=device)
    inputs[2].requires_grad_()
    (grad,) = torch.autograd.grad(fused(*inputs).sum(), inputs[2:3])
    (expected,) = torch.autograd.grad(reference.modulated_graph_conv(*inputs).sum(), inputs[2:3])
    torch.testing.assert_close(grad, expected)


def test_nan_stays_in_its_pose(device):
    inputs = make_inputs("modulated_graph_conv", (3, 17, 4, 21), device=device)
    clean = fused(*inputs)
    inputs[0][1, 2] = torch.nan
    out = fused(*inputs)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert bool(out[1].isnan().all())


@sweep(
    extra=["nothing", "residual", "film", "both"],
    activation=["none", "relu", "gelu"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_inference(extra, activation, dtype, device):
    """A folded BatchNorm, an activation, the residual, and scale and shift of a step, in one pass."""
    x, weight, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (2, 17, 4, 21), device=device)
    hidden = (x @ torch.cat((weight[0], weight[1]), dim=-1)).to(dtype)  # [N, J, 2 C]
    scale, shift = 0.5 + torch.rand(21, device=device), torch.randn(21, device=device)
    residual = torch.randn(2, 17, 21, device=device).to(dtype) if extra in ("residual", "both") else None
    film = torch.randn(3, 42, device=device) if extra in ("film", "both") else None
    out = modulated_graph_conv_fwd(
        hidden, scale * modulation, adjacency, scale * bias + shift,
        torch.empty(2, 17, 21, dtype=dtype, device=device) if residual is None else residual.clone(),
        epilogue=Epilogue(activation, residual, film, torch.tensor([2], device=device)),
    )  # fmt: skip

    def plain(own, neighbors):
        diagonal = torch.diagonal(adjacency).double()
        off = adjacency.double() - torch.diag(diagonal)
        value = diagonal.unsqueeze(-1) * modulation * own + off @ (modulation * neighbors) + bias
        value = scale * value + shift
        value = {"none": lambda v: v, "relu": functional.relu, "gelu": functional.gelu}[activation](value)
        value = value if residual is None else value + residual.double()
        if film is not None:
            value = functional.silu(value * film[2, :21] + film[2, 21:])
        return value

    expected = plain(*hidden.double().chunk(2, dim=-1))
    tolerance = (2e-6 if dtype == torch.float32 else 1e-2) * float(expected.abs().max())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


def test_inference_in_place(device):
    """The result may replace the residual."""
    hidden, modulation = torch.randn(3, 4, 10, device=device), torch.randn(4, 5, device=device)
    adjacency, residual = torch.rand(4, 4, device=device), torch.randn(3, 4, 5, device=device)
    arguments = hidden, modulation, adjacency, None
    epilogue = Epilogue("gelu", residual)
    expected = modulated_graph_conv_fwd(*arguments, torch.empty_like(residual), epilogue=epilogue)
    actual = modulated_graph_conv_fwd(*arguments, residual, epilogue=epilogue)
    assert actual is residual and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=shape_id)
def test_opcheck(dtype, device):
    x, weight, modulation, adjacency, bias = make_inputs("modulated_graph_conv", (2, 3, 4, 6), dtype=dtype)
    x, weight, modulation, adjacency, bias = (
        tensor.to(device) for tensor in (x, weight, modulation.float(), adjacency.float(), bias.float())
    )
    forward, backward = (
        torch.ops.diffupose.modulated_graph_conv_fwd.default,
        torch.ops.diffupose.modulated_graph_conv_bwd.default,
    )
    arguments = x, weight, modulation, adjacency
    results = torch.library.opcheck(forward, (*arguments, bias, "triton"))
    out, hidden = forward(*arguments, bias, "triton")
    more = torch.library.opcheck(backward, (torch.randn_like(out), *arguments, hidden, True, "triton"))
    assert set(results.values()) | set(more.values()) == {"SUCCESS"}


def test_what_triton_does_not_take(device):
    inputs = make_inputs("modulated_graph_conv", (2, 3, 4, 5), device=device)
    with pytest.raises(BackendUnavailableError, match=r"takes float32, float16 and bfloat16, got torch\.float64"):
        fused(*(tensor.double() for tensor in inputs))
    with pytest.raises(BackendUnavailableError, match="takes 64 joints at most, got 65"):
        fused(*make_inputs("modulated_graph_conv", (1, 65, 2, 2), device=device))
    with pytest.raises(BackendUnavailableError, match="at least one joint and one channel"):
        fused(inputs[0][..., :0], inputs[1][:, :0], *inputs[2:])
