"""The reverse step in Triton: the op, and the launcher that a captured graph uses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.sweeps import sweep

from diffupose import ops, reference
from diffupose.errors import BackendUnavailableError
from diffupose.kernels.reverse_step import DrawnNoise, TableRow
from diffupose.kernels.reverse_step import reverse_step as kernel
from diffupose.testing import assert_parity, make_inputs, requires_cpp, requires_cuda


def fused(
    sample, model_output, coefficients, step, x0_last, noise, noise_scale, clip=None, backend="triton", **options
):
    """The public op under the argument order of ``make_inputs``."""
    return ops.reverse_step(
        sample, model_output, coefficients.cpu(), step, x0_last=x0_last, noise=noise, noise_scale=noise_scale,
        clip_sample_range=clip, backend=backend, **options,
    )  # fmt: skip


def plain(sample, model_output, coefficients, step, x0_last, noise, noise_scale, clip=None):
    return reference.reverse_step(sample, model_output, coefficients, step, x0_last, noise, clip, noise_scale)


SHAPES = [(1, 1, 1, 3), (0, 2, 17, 3), (33, 1, 15, 5), (3, 7, 16, 4), (1, 33, 17, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@sweep(shape=SHAPES, dtype=DTYPES, clip=[None, 0.5])
def test_parity(shape, dtype, clip, device):
    inputs = list(make_inputs("reverse_step", shape, dtype=dtype, device=device))
    inputs[2] = inputs[2].float()  # the table stays as it is
    assert_parity(partial(fused, clip=clip), partial(plain, clip=clip), inputs)
    if dtype == torch.float32:  # the same operations in the same order give the same bits
        pairs = zip(fused(*inputs, clip=clip), plain(*inputs, clip=clip), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("coefficients", torch.tensor([[1.0, 0], [0, 1], [0.7, -0.3]]).unbind())
def test_every_combination_of_terms(coefficients, device):
    """A tensor whose coefficient is 0 may be NaN or missing. The results are the same bits as the reference's."""
    sample, output, _, _, x0_last, noise, scale = make_inputs("reverse_step", (3, 2, 17, 5), device=device)
    nan = torch.full_like(sample, torch.nan)
    p, q = coefficients.tolist()
    for terms in range(1, 16):
        c_x, c_0, c_1, s = ((terms >> bit & 1) * (bit + 0.5) for bit in range(4))
        row = torch.tensor([[p, q, c_x, c_0, c_1, s]])
        given = (
            sample if p or c_x else nan,
            output if q else torch.full_like(output, torch.nan),
            row,
            0,
            x0_last if c_1 else nan,
            noise if s else nan,
            scale[:1] if s else torch.full_like(scale[:1], torch.nan),
        )
        actual, expected = fused(*given), plain(*given)
        assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(actual, expected, strict=True))
        if not c_1 and not s:
            missing = fused(*given[:4], None, None, None)
            assert all(torch.equal(a, b) for a, b in zip(missing, expected, strict=True))


def test_nan_reaches_only_what_uses_it(device):
    """A NaN in x_t that only the next sample uses does not reach x0, and the other way round."""
    sample, output, *_ = make_inputs("reverse_step", (1, 2, 5), device=device)
    nan = torch.full_like(sample, torch.nan)
    prev_sample, x0 = fused(nan, output, torch.tensor([[0.0, 1, 1, 0, 0, 0]]), 0, None, None, None)
    assert bool(prev_sample.isnan().all()) and torch.equal(x0, output[..., :3])
    prev_sample, x0 = fused(nan, output, torch.tensor([[1.0, 1, 0, 0, 1, 0]]), 0, sample, None, None)
    assert torch.equal(prev_sample, sample) and bool(x0.isnan().all())
    prev_sample, x0 = fused(sample, nan, torch.tensor([[0.0, 1, 1, 0, 0, 0]]), 0, None, None, None)
    assert torch.equal(prev_sample, sample) and bool(x0.isnan().all())


def test_nan_reaches_the_results(device):
    inputs = make_inputs("reverse_step", (2, 3, 4), device=device)
    for index in (0, 1, 4, 5, 6):
        changed = list(inputs)
        changed[index] = changed[index].clone()
        changed[index][..., 1, :] = torch.nan
        for actual, expected in zip(fused(*changed, clip=0.3), plain(*changed, clip=0.3), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())


def test_strides(device):
    """Inputs may be wide, sliced, transposed or expanded. Channels after the third are ignored, no input changes."""
    inputs = make_inputs("reverse_step", (3, 2, 17), device=device)
    expected = plain(*inputs)
    copies = [tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for tensor in inputs]
    out = inputs[1]
    wide = torch.full((3, 2, 17, 7), torch.nan, device=device)
    wide[..., :3] = out
    for output in (wide, torch.stack((out, out), dim=-1)[..., 1], out.transpose(0, 2).contiguous().transpose(0, 2)):
        results = fused(inputs[0], output, *inputs[2:])
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    every = [x.transpose(0, 1).contiguous().transpose(0, 1) if i in (0, 4, 5) else x for i, x in enumerate(inputs)]
    assert all(torch.equal(a, b) for a, b in zip(fused(*every), expected, strict=True))
    same = out[:1, :1, :1].expand_as(out)
    pairs = zip(fused(inputs[0], same, *inputs[2:]), plain(inputs[0], same, *inputs[2:]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("joints", [1, 15, 17])
def test_drawn_noise(joints, device):
    """The noise has the bits of philox_normal in every batch. Nothing is written behind a pose."""
    sample, output, coefficients, step, x0_last, _, scale = make_inputs("reverse_step", (7, 5, joints), device=device)
    frames = torch.randint(-(2**63), 2**63 - 1, (7,), device=device)
    hypotheses = torch.randint(0, 2**32, (5,), device=device)
    noise = ops.philox_normal(2**64 - 3, frames, hypotheses, step, 3 * joints, backend="triton").view(sample.shape)
    expected = plain(sample, output, coefficients, step, x0_last, noise, scale)
    draw = {"seed": 2**64 - 3, "hypothesis_ids": hypotheses}
    actual = fused(sample, output, coefficients, step, x0_last, None, scale, frame_ids=frames, **draw)
    alone = fused(*(x[5:6] for x in (sample, output)), coefficients, step, x0_last[5:6], None, scale,
                  frame_ids=frames[5:6], **draw)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, expected, strict=True))


@requires_cpp
def test_same_step_as_cpp(device):
    inputs = make_inputs("reverse_step", (3, 4, 17), device=device)
    host = [x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs]
    inputs, host = ([*given[:5], None, *given[6:]] for given in (list(inputs), host))
    for a, b in zip(fused(*inputs, seed=3), fused(*host, seed=3, backend="cpp"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-6)


def test_row_by_a_tensor_and_in_place(device):
    """The launcher reads the row on the device and works in place. It keeps x0 only if asked to."""
    sample, output, coefficients, _, x0_last, _, scale = make_inputs("reverse_step", (2, 3, 17), device=device)
    ids = torch.arange(2, device=device), torch.arange(3, device=device)
    step, seed = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([11], device=device)
    for row in range(2):
        expected = fused(sample, output, coefficients, row, x0_last, None, scale, 0.8, seed=11)
        x, x0 = sample.clone(), x0_last.clone()
        table_row, noise = TableRow(coefficients, step, scale), DrawnNoise(seed, *ids)
        kernel(x, output, table_row, x0, noise, 0.8, out=(x, x0))
        assert torch.equal(x, expected[0]) and torch.equal(x0, expected[1])
        kernel(x.copy_(sample), output, table_row, x0_last, noise, 0.8, out=(x, None))
        assert torch.equal(x, expected[0])
        step += 1


def test_step_in_a_tensor(device):
    """A row on the device gives the results of a row on the CPU, and NaN if an input that it needs is missing."""
    sample, output, coefficients, _, x0_last, noise, scale = make_inputs("reverse_step", (2, 3, 17), device=device)
    for row in range(2):
        for given in (None, noise):
            expected = fused(sample, output, coefficients, row, x0_last, given, scale, 0.7, seed=5)
            actual = ops.reverse_step(
                sample, output, coefficients, torch.tensor([row], device=device), x0_last=x0_last, noise=given,
                noise_scale=scale, clip_sample_range=0.7, seed=5, backend="triton",
            )  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    step = torch.ones(1, dtype=torch.int64, device=device)
    previous, x0 = ops.reverse_step(sample, output, coefficients, step, noise=noise, backend="triton")
    assert bool(previous.isnan().all()) and bool(x0.isfinite().all())
    previous, x0 = kernel(sample, output, TableRow(coefficients, step), x0_last)  # without noise
    assert bool(previous.isnan().all()) and bool(x0.isfinite().all())
    spaced = torch.stack((sample, sample), dim=-1)[..., 0]
    with pytest.raises(ValueError, match="out must be contiguous"):
        kernel(spaced, output, TableRow(coefficients, step), x0_last, noise, out=(spaced, None))


@requires_cuda
def test_op_in_a_graph():
    """A graph of the op takes the row that the tensor holds when it is replayed."""
    sample, output, table, _, x0_last, _, scale = make_inputs("reverse_step", (2, 3, 17), device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call():
        return ops.reverse_step(
            sample, output, table, step, x0_last=x0_last, noise=None, noise_scale=scale, seed=3, backend="triton"
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for row in range(2):
        step.fill_(row)
        graph.replay()
        expected = fused(sample, output, table, row, x0_last, None, scale, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_joints(device):
    sample, output, coefficients, step, x0_last, _, scale = make_inputs("reverse_step", (2, 3, 0), device=device)
    for result in fused(sample, output, coefficients, step, x0_last, None, scale):
        assert result.shape == (2, 3, 0, 3)


def test_opcheck_and_errors(device):
    sample, output, coefficients, step, x0_last, noise, scale = make_inputs("reverse_step", (2, 3, 4), device=device)
    ids, host = (torch.arange(2, device=device), torch.arange(3, device=device)), coefficients.cpu()
    op = torch.ops.diffupose.reverse_step.default
    drawn = (sample, output, host, step, None, x0_last, None, scale, -5, *ids, None, "triton")
    given = (sample, output, host, 0, None, None, noise, None, 0, None, None, 0.5, "triton")
    row = torch.tensor([step], device=device)
    from_device = (sample, output, coefficients, 0, row, x0_last, None, scale, -5, *ids, None, "triton")
    for arguments in (drawn, given, from_device):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match="a row of the step table must have a term that is not 0"):
        fused(sample, output, torch.zeros(1, 6), 0, x0_last, noise, None)
    with pytest.raises(ValueError, match=r"x0_last is needed by row 1 of this table"):
        fused(sample, output, coefficients, step, None, noise, scale)
    with pytest.raises(ValueError, match=r"frame_ids must have shape \[2\], got \(3,\)"):
        fused(sample, output, coefficients, step, x0_last, None, scale, frame_ids=torch.arange(3, device=device))
    with pytest.raises(BackendUnavailableError, match="Triton kernel has no gradient"):
        fused(sample.clone().requires_grad_(), output, coefficients, step, x0_last, noise, scale)
    with pytest.raises(BackendUnavailableError, match=r"takes sample in float32, float16 or bfloat16, got torch\.fl"):
        fused(sample.double(), output, coefficients, step, x0_last, noise, scale)


@requires_cuda
def test_tensors_of_two_devices():
    sample, output, coefficients, step, x0_last, noise, scale = make_inputs("reverse_step", (2, 3, 4), device="cuda")
    with pytest.raises(ValueError, match="x0_last must be on the device of sample, cuda:0, got cpu"):
        fused(sample, output, coefficients, step, x0_last.cpu(), noise, scale)
