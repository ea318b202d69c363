"""The public op, in C++, in CUDA and through the reference."""

import math
from functools import partial

import pytest
import torch

from diffupose import ops
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend
from diffupose.reference.reverse_step import reverse_step
from diffupose.schedule import NoiseSchedule, step_table
from diffupose.testing import assert_parity, make_inputs, shape_id


def coefficient_tensor(steps, **options):
    return torch.from_numpy(step_table(NoiseSchedule(100), steps, **options).coefficients)


def run(sample, model_output, coefficients, step, x0_last, noise, noise_scale, clip=None, backend=None, **options):
    """The public op under the argument order of ``make_inputs``."""
    return ops.reverse_step(
        sample, model_output, coefficients, step, x0_last=x0_last, noise=noise, noise_scale=noise_scale,
        clip_sample_range=clip, backend=backend, **options,
    )  # fmt: skip


def plain(sample, model_output, coefficients, step, x0_last, noise, noise_scale, clip=None):
    return reverse_step(sample, model_output, coefficients, step, x0_last, noise, clip, noise_scale)


@pytest.fixture
def fused(kernel_backend):
    return partial(run, backend=kernel_backend)


def inputs_for(shape, device, dtype=torch.float32):
    """Random inputs; the table stays on the CPU, in float32."""
    table = make_inputs("reverse_step", shape)[2]
    inputs = list(make_inputs("reverse_step", shape, dtype=dtype, device=device))
    inputs[2] = table
    return inputs


def assert_same(actual, expected):
    """The same operations in the same order give the same bits, except on a GPU, which rounds a x + b once."""
    for value, truth in zip(actual, expected, strict=True):
        assert torch.equal(value.isnan(), truth.isnan())
        tolerance = 0.0 if value.device.type == "cpu" else 2e-6
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, equal_nan=True)


# The last one takes more than one block of the CUDA kernel and does not fill the last block.
SHAPES = [(1, 1, 1, 3), (0, 2, 17, 3), (33, 1, 15, 5), (3, 7, 16, 4), (1, 33, 17, 3), (3, 29, 17, 5)]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_parity(fused, shape, clip, device):
    inputs = inputs_for(shape, device)
    assert_parity(partial(fused, clip=clip), partial(plain, clip=clip), inputs)
    assert_same(fused(*inputs, clip=clip), plain(*inputs, clip=clip))


@pytest.mark.parametrize("dtypes", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES[1:], ids=shape_id)
def test_parity_of_smaller_dtypes(with_cuda, shape, dtypes, device):
    """The dtypes are those of the sample, with x0_last and noise, and of the model's output."""
    inputs = inputs_for(shape, device, dtypes[0])
    inputs[1] = inputs[1].to(dtypes[1])
    dtype = torch.promote_types(*dtypes)

    def exact(*arguments):
        return plain(*arguments, clip=0.5)

    in_half = partial(run, backend="cuda", clip=0.5)
    assert_parity(in_half, lambda *arguments: tuple(t.to(dtype) for t in exact(*arguments)), inputs, exact=exact)
    # The kernel computes in float32, so it is as exact as the results' dtype.
    truths = exact(*(x.double() if isinstance(x, torch.Tensor) and i != 2 else x for i, x in enumerate(inputs)))
    unit = torch.finfo(dtype).eps
    for value, truth in zip(in_half(*inputs), truths, strict=True):
        assert value.dtype == dtype
        assert bool(((value.double() - truth).abs() <= 0.51 * unit * truth.abs() + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=shape_id)
def test_every_number_of_sixteen_bits(with_cuda, dtype, device):
    """Every number is read and written unchanged: also NaN, subnormal and infinite ones."""
    bits = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16, device=device)  # 65535 = 3 * 21845
    numbers = bits.view(dtype).view(1, 5, -1, 3)
    row = torch.tensor([[0.0, 1, 0, 1, 0, 0]])
    for result in ops.reverse_step(torch.zeros_like(numbers), numbers, row, 0, backend="cuda"):
        assert torch.equal(result.isnan(), numbers.isnan())
        assert torch.equal(result.nan_to_num(0.0, 1.0, -1.0), numbers.nan_to_num(0.0, 1.0, -1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=shape_id)
def test_rounding_to_sixteen_bits(with_cuda, dtype, device):
    """Rounding is to nearest, ties to even, as in PyTorch: ties, their neighbours, overflow and underflow."""
    bits = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int16, device=device)
    numbers = bits.view(dtype).nan_to_num(1.0).view(1, 5, -1, 3)
    for factor in (1 + 2**-8, 1 + 2**-11, 1 - 2**-9, 0.5 + 2**-12, 1.75):
        row = torch.tensor([[1.0, 0, 0, factor, 0, 0]])
        result, _ = ops.reverse_step(numbers, numbers, row, 0, backend="cuda")
        assert torch.equal(result, (factor * numbers.float()).to(dtype))


@pytest.mark.parametrize("coefficients", torch.tensor([[1.0, 0], [0, 1], [0.7, -0.3]]).unbind())
def test_every_combination_of_terms(fused, coefficients, device):
    """A tensor whose coefficient is 0 may be NaN or missing. The results are the same bits as the reference's."""
    sample, output, _, _, x0_last, noise, scale = inputs_for((3, 2, 17, 5), device)
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
        assert all(bool(tensor.isfinite().all()) for tensor in actual)
        assert_same(actual, expected)
        if not c_1 and not s:
            assert_same(fused(*given[:4], None, None, None), expected)


def test_nan_reaches_the_results(fused, device):
    inputs = inputs_for((2, 3, 4), device)
    for index in (0, 1, 4, 5, 6):
        changed = list(inputs)
        changed[index] = torch.full_like(changed[index], torch.nan)
        assert_same(fused(*changed, clip=0.3), plain(*changed, clip=0.3))


def test_strides(fused, device):
    """Inputs may be wide, sliced, transposed or expanded. None changes, and none shares memory with the results."""
    inputs = inputs_for((3, 2, 17), device)
    expected = plain(*inputs)
    copies = [tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for tensor in inputs]
    out = inputs[1]
    wide = torch.full((3, 2, 17, 7), torch.nan, device=device)
    wide[..., :3] = out
    for output in (wide, torch.stack((out, out), dim=-1)[..., 1], out.transpose(0, 2).contiguous().transpose(0, 2)):
        results = fused(inputs[0], output, *inputs[2:])
        assert_same(results, expected)
        results[0].zero_()
    every = [x.transpose(0, 1).contiguous().transpose(0, 1) if i in (0, 4, 5) else x for i, x in enumerate(inputs)]
    assert_same(fused(*every), expected)
    # Unaligned views allow only accesses of single numbers.
    shifted = [torch.cat((x[:1], x))[1:] if i in (0, 1, 4, 5) else x for i, x in enumerate(inputs)]
    assert shifted[0].data_ptr() % 16 != 0
    assert_same(fused(*shifted), expected)
    same = out[:1, :1, :1].expand_as(out)
    assert_same(fused(inputs[0], same, *inputs[2:]), plain(inputs[0], same, *inputs[2:]))
    for given, copy in zip(inputs, copies, strict=True):
        assert given == copy if isinstance(given, int) else torch.equal(given, copy)


@pytest.mark.parametrize("threads", [1, 3])
def test_drawn_noise(fused, kernel_backend, threads, device):
    """The noise has the bits of philox_normal for any batch and number of threads."""
    sample, output, coefficients, step, x0_last, _, scale = inputs_for((70, 9, 17), device)
    frames = torch.randint(-(2**63), 2**63 - 1, (70,)).to(device)
    hypotheses = torch.randint(0, 2**32, (9,)).to(device)
    noise = ops.philox_normal(2**64 - 3, frames, hypotheses, step, 51, backend=kernel_backend).view(sample.shape)
    expected = plain(sample, output, coefficients, step, x0_last, noise, scale)
    draw = {"seed": 2**64 - 3, "hypothesis_ids": hypotheses}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = fused(sample, output, coefficients, step, x0_last, None, scale, frame_ids=frames, **draw)
        alone = fused(*(x[5:6] for x in (sample, output)), coefficients, step, x0_last[5:6], None, scale,
                      frame_ids=frames[5:6], **draw)  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert_same(actual, expected)
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, actual, strict=True))
    torch_noise = run(sample, output, coefficients, step, x0_last, None, scale, None, "torch", frame_ids=frames, **draw)
    torch.testing.assert_close(torch_noise[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3, 1), (7, 5, 2), (41, 3, 15), (2, 1, 700), (2, 2100, 1)], ids=shape_id)
def test_drawn_noise_of_other_skeletons(fused, shape, device):
    """Poses of three numbers, and poses larger than a block of the CUDA kernel; default ids, no scale."""
    sample, output, coefficients, step, x0_last, _, _ = inputs_for(shape, device)
    ids = torch.arange(shape[0], device=device), torch.arange(shape[1], device=device)
    noise = ops.philox_normal(11, *ids, step, 3 * shape[2], backend="torch").view(sample.shape)
    actual = fused(sample, output, coefficients, step, x0_last, None, None, seed=11)
    for value, truth in zip(actual, plain(sample, output, coefficients, step, x0_last, noise, None), strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6)


def device_step(tensors, table, index, /, **changes):
    """Call the CUDA launcher as in a captured graph: the row and its number are on the device."""
    sample, output, x0_last, scale, frames, hypotheses, previous, x0 = tensors
    arguments = {
        "row": None, "step": 0, "table": table.data_ptr(), "index": index.data_ptr(), "clip": 0.7,
        "dtype": "float32", "output_dtype": "float32", "sample": sample.data_ptr(), "model_output": output.data_ptr(),
        "output_stride": output.shape[-1], "x0_last": x0_last.data_ptr(), "noise": 0, "noise_scale": scale.data_ptr(),
        "seed": 5, "frame_ids": frames.data_ptr(), "hypothesis_ids": hypotheses.data_ptr(),
        "prev_sample": previous.data_ptr(), "x0": x0.data_ptr(), "num_frames": sample.shape[0],
        "num_hypotheses": sample.shape[1], "num_joints": sample.shape[2], "stream": _backend.stream_of(sample),
    }  # fmt: skip
    _backend.cuda().reverse_step(**(arguments | changes))


def test_step_from_the_device_in_place(with_cuda, device):
    """A chain as in a graph: the step is counted on the device, x_t and x0 are replaced in place."""
    sample, output, _, _, x0_last, _, _ = inputs_for((3, 5, 17, 5), device)
    table = step_table(NoiseSchedule(100), 4, sampler="ddpm", prediction_type="sample").tensor()
    table = torch.cat((table, coefficient_tensor(4, sampler="dpm++", prediction_type="sample").float()))
    scale = 0.5 + torch.rand(len(table), 17, 3, device=device)
    ids = torch.tensor([9, -4, 2], device=device), torch.arange(5, device=device)
    x, x0, index = sample.clone(), x0_last.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    for step in range(len(table)):
        device_step((x, output, x0, scale, *ids, x, x0), table.to(device), index)
        sample, x0_last = run(sample, output, table, step, x0_last, None, scale, 0.7, "cuda", seed=5, frame_ids=ids[0])
        assert torch.equal(x, sample) and torch.equal(x0, x0_last)
        index += 1
        output = output.roll(1, dims=0)
    # Without an address for x0, none is written.
    before = x0.clone()
    device_step((sample.clone(), output, x0, scale, *ids, x, x0), table.to(device), index * 0, x0=0)
    assert torch.equal(x0, before)


@pytest.mark.parametrize("backend", ["torch", "cpp", "cuda"])
def test_step_in_a_tensor(backend, device, request):
    """A row on the device gives the results of a row on the CPU."""
    if backend == "cuda":
        request.getfixturevalue("with_cuda")
    elif backend == "cpp" and not (ops.available_backends()["cpp"][0] and device.type == "cpu"):
        pytest.skip("C++ does not run on this device")
    sample, output, coefficients, _, x0_last, noise, scale = inputs_for((3, 5, 17, 5), device)
    for row in range(len(coefficients)):
        for given in (None, noise):
            arguments = (x0_last, given, scale, 0.7, backend)
            expected = run(sample, output, coefficients, row, *arguments, seed=5)
            for step in (torch.tensor(row, device=device), torch.tensor([row], device=device)):
                actual = run(sample, output, coefficients.to(device), step, *arguments, seed=5)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    table = coefficients.to(device)
    for step in (torch.tensor([0.0], device=device), torch.tensor([0, 1], device=device)):
        with pytest.raises(ValueError, match="step must be an int, or one int64 on"):
            run(sample, output, table, step, x0_last, noise, scale, backend=backend)
    step = torch.ones(1, dtype=torch.int64, device=device)
    if backend == "cuda":
        previous, x0 = run(sample, output, table, step, None, noise, scale, backend=backend)
        assert bool(previous.isnan().all()) and bool(x0.isfinite().all())
    else:
        with pytest.raises(ValueError, match="x0_last is needed by row 1 of this table"):
            run(sample, output, table, step, None, noise, scale, backend=backend)
        with pytest.raises(ValueError, match=r"step must lie in \[0, 2\), got 2"):
            run(sample, output, table, step + 1, x0_last, noise, scale, backend=backend)


def test_null_pointers_are_rejected(with_cuda, device):
    sample, output, coefficients, _, x0_last, _, scale = inputs_for((2, 3, 4), device)
    table, index = coefficients.to(device), torch.zeros(1, dtype=torch.int64, device=device)
    ids = torch.arange(2, device=device), torch.arange(3, device=device)
    tensors = (sample, output, x0_last, scale, *ids, torch.empty_like(sample), torch.empty_like(sample))
    device_step(tensors, table, index)
    for name in ("table", "index", "sample", "model_output", "frame_ids", "hypothesis_ids", "prev_sample"):
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            device_step(tensors, table, index, **{name: 0})
    with pytest.raises(ValueError, match="a dtype must be float32, float16 or bfloat16, got float64"):
        device_step(tensors, table, index, dtype="float64")
    with pytest.raises(ValueError, match="model_output must have the storage of sample"):
        device_step(tensors, table, index, dtype="float16")


def test_gradcheck():
    """The reference has a gradient; ``auto`` takes it if a gradient is needed."""
    sample, output, coefficients, _, x0_last, noise, _ = make_inputs("reverse_step", (1, 2, 2), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (sample, output, x0_last, noise)]

    def step(sample, output, x0_last, noise):
        return run(sample, output, coefficients, 1, x0_last, noise, None, backend="auto")

    assert torch.autograd.gradcheck(step, leaves)


def opcheck(backend, device):
    sample, output, coefficients, step, x0_last, noise, scale = inputs_for((2, 3, 4, 5), device)
    ids = torch.arange(2, device=device), torch.arange(3, device=device)
    op = torch.ops.diffupose.reverse_step.default
    drawn = (sample, output, coefficients, step, None, x0_last, None, scale, -5, *ids, None, backend)
    given = (sample, output, coefficients, 0, None, None, noise, None, 0, None, None, 0.5, backend)
    table, row = coefficients.to(device), torch.tensor([step], device=device)
    from_device = (sample, output, table, 0, row, x0_last, None, scale, -5, *ids, None, backend)
    for arguments in (drawn, given, from_device):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_opcheck(kernel_backend, device):
    opcheck(kernel_backend, device)


def test_opcheck_of_the_reference(device):
    opcheck("torch", device)


def test_compile(fused, device):
    inputs = inputs_for((2, 3, 17, 5), device)
    compiled = torch.compile(fused, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), fused(*inputs), strict=True))


def test_errors_of_fused_code(fused, kernel_backend, device):
    sample, output, coefficients, step, x0_last, noise, scale = inputs_for((2, 3, 4), device)
    code = {"cpp": r"C\+\+ code", "cuda": "CUDA code"}[kernel_backend]
    with pytest.raises(ValueError, match="a row of the step table must have a term that is not 0"):
        fused(sample, output, torch.zeros(1, 6), 0, x0_last, noise, None)
    with pytest.raises(ValueError, match=r"x0_last is needed by row 1 of this table \(c_1 = -0\.2\), got None"):
        fused(sample, output, coefficients, step, None, noise, scale)
    with pytest.raises(ValueError, match=r"frame_ids must have shape \[2\], got \(3,\)"):
        fused(sample, output, coefficients, step, x0_last, None, scale, frame_ids=torch.arange(3, device=device))
    with pytest.raises(ValueError, match="hypothesis_ids must be int64"):
        fused(sample, output, coefficients, step, x0_last, None, scale, hypothesis_ids=torch.zeros(3, device=device))
    for clip in (-0.5, math.nan):
        with pytest.raises(ValueError, match="clip_sample_range must not be negative, got"):
            fused(sample, output, coefficients, step, x0_last, noise, scale, clip)
    with pytest.raises(ValueError, match="seed must fit 64 bits"):
        fused(sample, output, coefficients, step, x0_last, None, scale, seed=2**64)
    with pytest.raises(ValueError, match=r"x0_last must be on the device of sample, .*, got meta"):
        fused(sample, output, coefficients, step, x0_last.to("meta"), noise, scale)
    with pytest.raises(ValueError, match="noise must be a tensor, got ndarray"):
        fused(sample, output, coefficients, step, x0_last, noise.cpu().numpy(), scale)
    with pytest.raises(BackendUnavailableError, match=f"this op's {code} has no gradient"):
        fused(sample.clone().requires_grad_(), output, coefficients, step, x0_last, noise, scale)
    with pytest.raises(BackendUnavailableError, match=rf"{code} takes sample in float32.*, got torch\.float64"):
        fused(sample.double(), output, coefficients, step, x0_last, noise, scale)
    with pytest.raises(BackendUnavailableError, match=rf"{code} takes noise_scale in float32.*, got torch\.int32"):
        fused(sample, output, coefficients, step, x0_last, noise, scale.int())


def test_what_cuda_does_not_take(with_cuda, device):
    sample, output, coefficients, step, x0_last, noise, scale = inputs_for((2, 3, 4), device, torch.float16)
    with pytest.raises(BackendUnavailableError, match=r"takes x0_last in torch\.float16.*got torch\.float32"):
        run(sample, output, coefficients, step, x0_last.float(), noise, scale, backend="cuda")
