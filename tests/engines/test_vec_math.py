"""exp, SiLU and GELU of the engine, through programs of one layer, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from diffupose.engines.layer_program import Attention, GraphConv, LayerProgram, Linear, ScaleShift
from diffupose.ops import PackedDenoiser
from diffupose.testing import requires_cpp

pytestmark = requires_cpp

STEP = torch.tensor([0])
NAN, INF = float("nan"), float("inf")


def spread_over(largest):
    """Numbers of both signs and every size up to ``largest``, and plenty where the functions bend."""
    sizes = torch.logspace(-30, torch.tensor(largest).log10().item(), 700, dtype=torch.float64)
    return torch.cat((sizes, -sizes, torch.linspace(-12, 12, 4801, dtype=torch.float64), torch.zeros(1))).float()


def run(layer, x, parameters=()):
    """Apply a layer of three channels to ``[N, 3]``."""
    packed = PackedDenoiser(LayerProgram(1, (3, 3), (layer,), lambda timesteps: list(parameters)))
    return packed.denoise(x.unsqueeze(1), torch.empty(len(x), 1, 0), STEP)[:, 0]


def attention_of(joints):
    """Attention of one head of one channel; its result is the first of three channels."""
    three_times = Linear(1, 2, torch.ones(1, 3), torch.zeros(3))  # an output has three channels at least
    layers = (Attention(0, 1, 1, 1), three_times)
    return PackedDenoiser(LayerProgram(joints, (3, 1, 3), layers, lambda timesteps: []))


def gelu(x):
    """The engine's GELU of ``[N]``: a graph convolution that takes the first channel and passes it on."""
    weight, plain = torch.zeros(2, 3, 3), torch.ones(1, 3)
    weight[0, 0] = 1.0
    layer = GraphConv(0, 1, weight, plain, 0 * plain, torch.zeros(1, 1), torch.zeros(3), activation="gelu")
    return run(layer, torch.nn.functional.pad(x.unsqueeze(1), (0, 2)))


def silu(x):
    identity = [(torch.ones(1, 3), torch.zeros(1, 3))]
    return run(ScaleShift(0, 1, 0, 3, normalize=False), x.unsqueeze(1).expand(-1, 3), identity)


def test_gelu_is_as_exact_as_float32_can_be(isa):
    x = spread_over(1e30)
    out = gelu(x)
    assert torch.equal(out, out[:, :1].expand(-1, 3))  # every lane alike
    # erfc, and not 1 + erf, which loses all digits of a small result.
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    error = (out[:, 0].double() - exact).abs()
    assert bool((error <= 4e-7 * exact.abs() + 1e-37)[x > -1].all())
    assert bool((error <= 1e-6 * exact.abs())[(x > -2) & (x <= -1)].all())
    # Of small results most digits stay: e^(-x^2 / 2) has an argument whose rounding costs some.
    assert bool((error <= 2e-5 * exact.abs())[(x > -6) & (x <= -2)].all())
    assert bool((error <= 3e-3 * exact.abs() + 1e-37)[x <= -6].all())
    plain = (functional.gelu(x).double() - exact).abs()
    assert error.max() <= 2 * plain.max() + 1e-6 * exact[x.abs() < 12].abs().max()


def test_silu_is_as_exact_as_float32_can_be(isa):
    x = spread_over(1e30)
    out = silu(x)
    assert torch.equal(out, out[:, :1].expand(-1, 3))
    exact = x.double() * torch.sigmoid(x.double())
    error = (out[:, 0].double() - exact).abs()
    assert bool((error <= 4e-7 * exact.abs() + 1e-37)[x.abs() < 80].all())
    # Past e^88 the quotient stops falling, far below anything that counts.
    assert bool((error <= 4e-7 * exact.abs() + 1e-37 * x.abs().double().clamp(min=1))[x < 1e30].all())


def test_softmax_is_exact_over_the_whole_range_of_exp(isa):
    """64 keys whose scores fall from 0 to -86; the value of pose n is 1 at key n, so that its weight comes out."""
    joints = 64
    score = torch.linspace(0, -86, joints)
    sample = torch.zeros(joints, joints, 3)
    sample[..., 0], sample[..., 1], sample[..., 2] = 1.0, score, torch.eye(joints)
    packed = attention_of(joints)
    out = packed.denoise(sample, torch.empty(joints, joints, 0), STEP)[..., 0]  # [pose, query]
    exact = torch.softmax(score.double(), dim=0)
    assert torch.equal(out, out[:, :1].expand(-1, joints))
    assert bool(((out[:, 0].double() - exact).abs() <= 1e-6 * exact).all())


def test_softmax_does_not_overflow_or_vanish(isa):
    for shift in (-3e38, -1e4, 0.0, 1e4, 3e38):
        sample = torch.tensor([[[1.0, shift, 2.0], [1.0, shift, 4.0], [1.0, -3.2e38, 7.0]]])
        packed = attention_of(3)
        out = packed.denoise(sample, torch.empty(1, 3, 0), STEP)[..., 0]
        assert torch.allclose(out, torch.full((1, 3), 3.0), rtol=1e-6), shift


# A NaN carries bits of its own: those of x86, others, and what low bits they may have.
NANS = torch.tensor(
    [0x7FC00000, -0x400000, 0x7FC00001, 0x7F800001, 0x7FC000FF, 0x7FFFFFFF, -1, -0x3FFEFF], dtype=torch.int32
).view(torch.float32)


def test_no_nan_or_infinity_becomes_a_number(isa):
    assert bool(NANS.isnan().all())
    special = torch.cat((NANS, torch.tensor([INF, -INF])))
    assert not bool(gelu(special).isfinite().any())
    assert not bool(silu(special).isfinite().any())
    assert bool(silu(NANS).isnan().all()) and bool(gelu(NANS).isnan().all())
    assert bool((silu(torch.tensor([INF])) == INF).all())
    normalized = run(
        ScaleShift(0, 1, 0, 3, normalize=True), torch.tensor([[NAN, 1, 2], [1, INF, 2], [-INF, 1, INF]]),
        [(torch.ones(1, 3), torch.zeros(1, 3))],
    )  # fmt: skip
    assert bool(normalized.isnan().all())


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_activations_pass_nan_on(isa, activation):
    ones = torch.ones(1, 3)
    weight = torch.ones(2, 3, 3)
    layer = GraphConv(0, 1, weight, ones, ones, torch.zeros(1, 1), torch.zeros(3), activation=activation)
    assert bool(run(layer, NANS.unsqueeze(1).expand(-1, 3)).isnan().all())


@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("nan", range(len(NANS)))
def test_attention_passes_nan_on(isa, part, nan):
    """A NaN in a query stays with it; one in a key or a value reaches every query of its pose, and no other pose."""
    joints = 17
    sample = torch.randn(3, joints, 3)
    packed = attention_of(joints)
    condition = torch.empty(3, joints, 0)
    expected = packed.denoise(sample, condition, STEP)[..., 0]
    for joint in (0, 5, 16):
        broken = sample.clone()
        broken[1, joint, part] = NANS[nan]
        out = packed.denoise(broken, condition, STEP)[..., 0]
        touched = torch.zeros(3, joints, dtype=torch.bool)
        touched[1, joint if part == 0 else slice(None)] = True
        assert bool(out[touched].isnan().all())
        assert torch.equal(out[~touched], expected[~touched])
