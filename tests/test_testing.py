"""Tests of the parity rule itself: a wrong kernel must not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffupose.testing import assert_parity, make_inputs, shape_id


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        return grad_out @ weight.T, 1.001 * (x.T @ grad_out)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=shape_id)
def inputs(request):
    x, weight = torch.randn(33, 20), torch.randn(20, 7)
    return x.to(request.param).requires_grad_(), weight.to(request.param).requires_grad_()


def test_parity_of_the_same_formula(inputs):
    assert_parity(product, product, inputs)
    assert_parity(lambda x, w: (w.T @ x.T).T, product, inputs)


def test_parity_rejects_a_wrong_output(inputs):
    with pytest.raises(AssertionError, match="out: error"):
        assert_parity(lambda x, weight: 1.05 * (x @ weight), product, inputs)
    with pytest.raises(AssertionError, match="out: error nan"):
        assert_parity(lambda x, weight: x @ weight * float("nan"), product, inputs)
    with pytest.raises(AssertionError, match=r"out has shape \(33, 6\), expected \(33, 7\)"):
        assert_parity(lambda x, weight: (x @ weight)[:, :6], product, inputs)
    with pytest.raises(AssertionError, match=r"out is torch\.float64"):
        assert_parity(lambda x, weight: (x @ weight).double(), product, inputs)


def test_parity_rejects_a_wrong_gradient():
    inputs = torch.randn(33, 20, requires_grad=True), torch.randn(20, 7, requires_grad=True)
    with pytest.raises(AssertionError, match="grad_weight: error"):
        assert_parity(WrongGradient.apply, product, inputs)
    with pytest.raises(AssertionError, match="weight got no gradient"):
        assert_parity(lambda x, weight: x @ weight.detach(), product, inputs)


def test_parity_checks_every_output():
    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2

    inputs = (torch.randn(5),)
    assert_parity(pair, pair, inputs)
    with pytest.raises(AssertionError, match=r"out\[1\]: error"):
        assert_parity(lambda x: (x + 1, x * 2.1), pair, inputs)


def test_make_inputs():
    seed, frame_ids, hypothesis_ids, step, num_elements = make_inputs("philox_normal", (3, 2, 51))
    assert frame_ids.shape == (3,)
    assert hypothesis_ids.shape == (2,)
    assert (step >= 0, num_elements) == (True, 51)
    assert seed >= 2**63
    with pytest.raises(KeyError):
        make_inputs("no_such_op", (1,))
