"""Noise by counter in Triton."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from support.philox_python import float64_normals, philox_python

from diffupose import ops, reference
from diffupose.kernels.philox import box_muller, philox_4x32_10
from diffupose.kernels.philox_normal import philox_normal as kernel
from diffupose.testing import assert_parity, make_inputs, requires_cpp, shape_id


def fused(*inputs):
    return ops.philox_normal(*inputs, backend="triton")


@triton.jit
def words_kernel(counters_ptr, k0, k1, out_ptr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    c0, c1 = tl.load(counters_ptr + 4 * row).to(tl.uint32), tl.load(counters_ptr + 4 * row + 1).to(tl.uint32)
    c2, c3 = tl.load(counters_ptr + 4 * row + 2).to(tl.uint32), tl.load(counters_ptr + 4 * row + 3).to(tl.uint32)
    c0, c1, c2, c3 = philox_4x32_10(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(out_ptr + 4 * row, c0.to(tl.int64))
    tl.store(out_ptr + 4 * row + 1, c1.to(tl.int64))
    tl.store(out_ptr + 4 * row + 2, c2.to(tl.int64))
    tl.store(out_ptr + 4 * row + 3, c3.to(tl.int64))


@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0x80000001), (0xA4093822, 0x299F31D0)])
def test_integers_match_python(key, device):
    """The words include each bit set and not set."""
    counters = torch.randint(0, 2**32, (64, 4))
    counters[:40] = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])[torch.randint(0, 5, (40, 4))]
    counters, out = counters.to(device), torch.empty(64, 4, dtype=torch.int64, device=device)
    words_kernel[(1,)](counters, *key, out, BLOCK=64)
    assert out.tolist() == [philox_python(counter, list(key)) for counter in counters.tolist()]


@triton.jit
def normals_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    z0, z1 = box_muller(tl.load(words_ptr + 2 * row).to(tl.uint32), tl.load(words_ptr + 2 * row + 1).to(tl.uint32))
    tl.store(out_ptr + 2 * row, z0)
    tl.store(out_ptr + 2 * row + 1, z1)


def test_normals_of_given_words(device):
    """Among many others: both ends of the logarithm, and both sides of every eighth of a turn."""
    words = torch.randint(0, 2**32, (1 << 14, 2))
    words[:512, 0] = torch.tensor([0, 255, 256, 2**31, 2**32 - 257, 2**32 - 1]).repeat(86)[:512]
    words[512:1024, 1] = (torch.arange(512) % 8 * 2**29 + torch.randint(-600, 600, (512,))) % 2**32
    u1, u2 = ((words[:, 0] >> 8) + 1).double() / 2**24, (words[:, 1] >> 8).double() / 2**24
    angle = 2 * math.pi * u2
    expected = (-2 * u1.log()).sqrt().unsqueeze(1) * torch.stack((angle.cos(), angle.sin()), dim=1)
    out = torch.empty(1 << 14, 2, device=device)
    normals_kernel[(1,)](words.to(device), out, BLOCK=1 << 14, enable_fp_fusion=False)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=1e-6)


SHAPES = [(1, 1, 1), (1, 10, 51), (33, 3, 48), (2, 2, 2), (3, 1, 7), (0, 3, 4), (3, 0, 4), (3, 2, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_parity(shape, device):
    inputs = make_inputs("philox_normal", shape, device=device)
    assert_parity(fused, reference.philox_normal, inputs, exact=float64_normals)
    torch.testing.assert_close(fused(*inputs).double().cpu(), float64_normals(*inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("step", [0, 1, 0xFFFF])
def test_extreme_counters(seed, step, device):
    limits = torch.iinfo(torch.int64)
    frame_ids = torch.tensor([0, -1, limits.min, limits.max, 2**32, 2**32 - 1], device=device)
    hypothesis_ids = torch.tensor([0, 2**31, 2**32 - 1, 2**32 + 7], device=device)
    expected = float64_normals(seed, frame_ids, hypothesis_ids % 2**32, step, 5)
    noise = fused(seed, frame_ids, hypothesis_ids, step, 5)
    torch.testing.assert_close(noise.double().cpu(), expected, rtol=0, atol=1e-6)


@requires_cpp
def test_same_noise_as_cpp(device):
    inputs = make_inputs("philox_normal", (9, 7, 51), device=device)
    cpp = ops.philox_normal(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs), backend="cpp")
    torch.testing.assert_close(fused(*inputs).cpu(), cpp, rtol=0, atol=1e-6)


def test_independent_of_batch(device):
    """A hypothesis has the same bits in every batch. Ids may be slices of larger tensors."""
    seed, frame_ids, hypothesis_ids, step, count = make_inputs("philox_normal", (20, 12, 51), device=device)
    whole = fused(seed, frame_ids, hypothesis_ids, step, count)
    assert torch.equal(fused(seed, frame_ids[3:4], hypothesis_ids, step, count), whole[3:4])
    assert torch.equal(fused(seed, frame_ids[::2], hypothesis_ids[1::3], step, count), whole[::2, 1::3])
    assert torch.equal(fused(seed, frame_ids, hypothesis_ids, step, 5), whole[..., :5])


def test_seed_on_the_device(device):
    seed, *rest = make_inputs("philox_normal", (3, 2, 9), device=device)
    signed = seed - 2**64
    assert torch.equal(kernel(torch.tensor([signed], device=device), *rest), fused(seed, *rest))


def test_opcheck(device):
    ids = torch.arange(3, device=device), torch.arange(2, device=device)
    results = torch.library.opcheck(torch.ops.diffupose.philox_normal.default, (-5, *ids, 1, 7, "triton"))
    assert set(results.values()) == {"SUCCESS"}
