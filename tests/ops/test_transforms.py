"""torch.func and forward-mode AD: ops give the reference's derivatives, and other backends refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffupose import ops
from diffupose.errors import BackendUnavailableError
from diffupose.testing import make_inputs

PARAMETERS = make_inputs("modulated_graph_conv", (2, 5, 3, 4))[1:]


def of_graph_conv(x: Tensor, **options: str) -> Tensor:
    return ops.modulated_graph_conv(x, *(tensor.to(x.device, x.dtype) for tensor in PARAMETERS), **options)


def of_statistics(hypotheses: Tensor, **options: str) -> Tensor:
    return ops.hypothesis_statistics(hypotheses, **options).covariance


def of_step(sample: Tensor, **options: str) -> Tensor:
    row = torch.tensor([[0.5, -1.0, 0.5, 2.0, 0.0, 0.0]])
    return ops.reverse_step(sample, sample * sample, row, 0, **options)[0]


CASES = {of_graph_conv: (2, 5, 3), of_statistics: (2, 6, 5, 3), of_step: (2, 6, 5, 3)}


@pytest.fixture(params=CASES, ids=lambda function: function.__name__)
def function(request):
    return request.param


@pytest.fixture
def x(function):
    return torch.randn(CASES[function], generator=torch.Generator().manual_seed(0))


def test_derivatives(function, x):
    """Forward mode, by torch.func and by dual numbers, and reverse mode agree with differences in float64."""
    step = 1e-5 * x.double()
    expected = (function(x.double() + step) - function(x.double() - step)) / 2e-5
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
    close(torch.func.jvp(function, (x,), (x,))[1], expected)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent, expected)
    gradient = torch.func.grad(lambda x: function(x).sum())(x)
    close((gradient * x).sum(), expected.sum())


def test_vmap(function, x):
    both = torch.stack((x, -x))
    torch.testing.assert_close(torch.vmap(function)(both), torch.stack([function(x) for x in both]))


def test_named_backends_refuse(function, x, kernel_backend, device):
    with pytest.raises(BackendUnavailableError, match=r"has no rules for torch\.func"):
        torch.func.jvp(partial(function, backend=kernel_backend), (x.to(device),), (x.to(device),))
