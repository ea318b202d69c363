"""One step of a sampler in plain PyTorch, and chains of it."""

import math

import numpy as np
import pytest
import torch

from diffupose.reference.reverse_step import reverse_step
from diffupose.schedule import NoiseSchedule, step_table

SHAPE = (2, 3, 17, 3)  # [B, H, J, 3]


def coefficient_tensor(steps, **options):
    return torch.from_numpy(step_table(NoiseSchedule(100), steps, **options).coefficients)


def three_joints(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]  # [1, 1, 3, 3]


SAMPLE = three_joints([1, 2, 3], [4, 5, 6], [-1, 0, 2])
OUTPUT = three_joints([0, 1, -1], [2, 8, 3], [1, 1, 1])
X0_LAST = three_joints([1, 0, 2], [0, 1, 0], [2, 2, -1])
NOISE = three_joints([1, -1, 0], [0, 2, 1], [3, 0, -2])
# Row 1 is the one that is used: p, q, c_x, c_0, c_1, s.
ROWS = torch.tensor([[9, 9, 9, 9, 9, 9], [2, -1, 3, -2, 5, 4]], dtype=torch.float64)


def test_known_values():
    prev_sample, x0 = reverse_step(SAMPLE, OUTPUT, ROWS, 1, X0_LAST, NOISE)
    # 2 x - out: (2 - 0, 4 - 1, 6 + 1), (8 - 2, 10 - 8, 12 - 3), (-2 - 1, 0 - 1, 4 - 1).
    assert torch.equal(x0, three_joints([2, 3, 7], [6, 2, 9], [-3, -1, 3]))
    # 3 x - 2 x0 + 5 x0_last + 4 z, joint by joint:
    #   3 - 4 + 5 + 4,       6 - 6 + 0 - 4,      9 - 14 + 10 + 0
    #   12 - 12 + 0 + 0,     15 - 4 + 5 + 8,     18 - 18 + 0 + 4
    #   -3 + 6 + 10 + 12,    0 + 2 + 10 + 0,     6 - 6 - 5 - 8
    assert torch.equal(prev_sample, three_joints([8, -4, 5], [0, 24, 4], [25, 12, -13]))


def test_clip_comes_before_the_update():
    prev_sample, x0 = reverse_step(SAMPLE, OUTPUT, ROWS, 1, X0_LAST, NOISE, clip_sample_range=2.5)
    # (2, 3, 7), (6, 2, 9), (-3, -1, 3) within 2.5, on both sides.
    assert torch.equal(x0, three_joints([2, 2.5, 2.5], [2.5, 2, 2.5], [-2.5, -1, 2.5]))
    # As above, with -2 x0 = (-4, -5, -5), (-5, -4, -5), (5, 2, -5).
    assert torch.equal(prev_sample, three_joints([8, -3, 14], [7, 24, 17], [24, 12, -12]))


def test_a_clip_range_of_zero_is_a_range():
    _, x0 = reverse_step(SAMPLE, OUTPUT, ROWS, 1, X0_LAST, NOISE, clip_sample_range=0.0)
    assert torch.equal(x0, torch.zeros_like(SAMPLE))


def test_only_three_output_channels_are_read():
    """The released network has five; the rest may be anything, and the output may be a slice of something larger."""
    wide = torch.full((1, 1, 3, 5), torch.nan, dtype=torch.float64)
    wide[..., :3] = OUTPUT
    expected = reverse_step(SAMPLE, OUTPUT, ROWS, 1, X0_LAST, NOISE)
    for model_output in (wide, torch.stack((wide, wide), dim=-1)[..., 1]):
        actual = reverse_step(SAMPLE, model_output, ROWS, 1, X0_LAST, NOISE)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_inputs_are_left_alone():
    inputs = [tensor.clone() for tensor in (SAMPLE, OUTPUT, X0_LAST, NOISE)]
    last_row = torch.tensor([[0.0, 1, 0, 1, 0, 0]], dtype=torch.float64)
    prev_sample, x0 = reverse_step(inputs[0], inputs[1], last_row, 0, inputs[2], inputs[3], 2.5)
    reverse_step(inputs[0], inputs[1], ROWS, 1, inputs[2], inputs[3], 2.5)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (SAMPLE, OUTPUT, X0_LAST, NOISE), strict=True))
    prev_sample.zero_()
    assert x0.abs().sum() > 0  # x_prev is x0 in the last row, but not the same memory


def test_errors():
    solver, ddpm = coefficient_tensor(5, sampler="dpm++"), coefficient_tensor(5, sampler="ddpm")
    with pytest.raises(ValueError, match="needs x0_last or noise, got None"):
        reverse_step(SAMPLE, OUTPUT, solver, 1, x0_last=None, noise=NOISE)
    with pytest.raises(ValueError, match="needs x0_last or noise, got None"):
        reverse_step(SAMPLE, OUTPUT, ddpm, 0, x0_last=X0_LAST, noise=None)
    with pytest.raises(ValueError, match="must have a term that is not 0"):
        reverse_step(SAMPLE, OUTPUT, torch.zeros(1, 6), 0, X0_LAST, NOISE)


def test_unused_terms_need_no_tensor():
    for step in range(5):
        reverse_step(SAMPLE, OUTPUT, coefficient_tensor(5, sampler="ddpm"), step, noise=NOISE)
        reverse_step(SAMPLE, OUTPUT, coefficient_tensor(5, sampler="ddim"), step)
        reverse_step(SAMPLE, OUTPUT, coefficient_tensor(5, sampler="dpm++"), step, x0_last=X0_LAST if step else None)
    reverse_step(SAMPLE, OUTPUT, coefficient_tensor(5, sampler="dpm++"), 4)


def test_zero_coefficients_do_not_spread_nan():
    nan = torch.full_like(SAMPLE, torch.nan)
    solver = coefficient_tensor(5, sampler="dpm++")
    ddpm = coefficient_tensor(5, sampler="ddpm", prediction_type="sample")
    assert solver[0, 4] == 0
    assert ddpm[4, 5] == 0
    # The first row of a multistep solver has no x0_last yet, the last row draws no noise and reads no x_t.
    first = reverse_step(SAMPLE, OUTPUT, solver, 0, x0_last=nan, noise=nan)
    last = reverse_step(nan, OUTPUT, ddpm, 4, x0_last=nan, noise=nan)
    assert all(tensor.isfinite().all() for tensor in (*first, *last))
    assert torch.equal(last[0], OUTPUT)
    # Where a coefficient is not 0, NaN must arrive.
    assert reverse_step(SAMPLE, OUTPUT, solver, 1, x0_last=nan)[0].isnan().all()
    assert reverse_step(SAMPLE, OUTPUT, ddpm, 3, noise=nan)[0].isnan().all()
    assert reverse_step(SAMPLE, OUTPUT, ddpm, 3, noise=nan)[1].isfinite().all()


@pytest.mark.parametrize("num_joints", [1, 15, 16, 17])
@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_edges(batch_size, num_joints):
    shape = (batch_size, 2, num_joints, 3)
    sample, output, x0_last, noise = torch.randn(4, *shape)
    for tensors in ((sample, output, x0_last, noise), [torch.randn(*shape, 2)[..., 0] for _ in range(4)]):
        prev_sample, x0 = reverse_step(*tensors[:2], ROWS.float(), 1, *tensors[2:])
        assert prev_sample.shape == x0.shape == shape
        assert prev_sample.dtype == x0.dtype == torch.float32
        x, out, last, z = (tensor.double() for tensor in tensors)
        torch.testing.assert_close(prev_sample.double(), -x + 2 * out + 5 * last + 4 * z, rtol=0, atol=2e-5)


def gaussian_model(prediction_type, sigma=0.25):
    """Return the exact denoiser of poses whose coordinates are N(0, sigma^2), in metres."""
    cumprods = NoiseSchedule(100).alphas_cumprod

    def model(sample, t):
        cumprod = float(cumprods[t])
        variance = cumprod * sigma**2 + 1 - cumprod
        signal, noise = math.sqrt(cumprod), math.sqrt(1 - cumprod)
        if prediction_type == "sample":
            return signal * sigma**2 / variance * sample
        if prediction_type == "epsilon":
            return noise / variance * sample
        return signal * noise * (1 - sigma**2) / variance * sample

    return model


def run_chain(table, model, noise, error=None, clip=None, dtype=torch.float64):
    """Return the poses after a chain that starts at ``noise[0]``; ``error`` is added to the model's outputs."""
    coefficients = table.tensor() if dtype == torch.float32 else torch.from_numpy(table.coefficients)
    sample, x0 = noise[0].to(dtype), None
    for step, t in enumerate(table.timesteps.tolist()):
        output = model(sample, t)
        if error is not None and step < len(error):
            output = output + error[step]
        sample, x0 = reverse_step(sample, output, coefficients, step, x0, noise[step + 1].to(dtype), clip)
    return sample


def numpy_noise(steps, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((steps + 1, *SHAPE)))


# Epsilon prediction divides by sqrt(alphas_cumprod) = 4.9e-4 in the first step; fewer steps leave less time to forget.
@pytest.mark.parametrize(("steps", "expected"), [(1, 3e-3), (10, 9e-5), (100, 1e-5)])
def test_epsilon_is_sensitive_to_rounding(steps, expected):
    table = step_table(NoiseSchedule(100), steps, sampler="ddim", prediction_type="epsilon")
    noise, error = numpy_noise(steps), 5e-7 * numpy_noise(0, seed=1)  # the first output alone is moved
    model = gaussian_model("epsilon")
    moved = (run_chain(table, model, noise, error) - run_chain(table, model, noise)).abs().max().item()
    assert expected / 3 < moved < expected * 3


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_sample_and_v_are_not(steps, sampler, prediction_type):
    table = step_table(NoiseSchedule(100), steps, sampler=sampler, prediction_type=prediction_type)
    noise, error = numpy_noise(steps), 5e-7 * numpy_noise(steps, seed=1)  # every output is moved
    model = gaussian_model(prediction_type)
    moved = (run_chain(table, model, noise, error) - run_chain(table, model, noise)).abs().max().item()
    assert 5e-8 < moved < 3e-6


def test_gaussian_poses_come_out_as_they_are():
    """A check of the helper and of the whole chain: with the exact model, the poses have the data's deviation."""
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        for sampler in ("ddpm", "ddim", "dpm++"):
            table = step_table(NoiseSchedule(100), 100, sampler=sampler, prediction_type=prediction_type)
            poses = run_chain(table, gaussian_model(prediction_type), numpy_noise(100))
            assert poses.std().item() == pytest.approx(0.25, rel=0.15), (prediction_type, sampler)


def dummy_model(sample, t):
    return sample * t / (t + 1) + 0.1 * torch.sin(3 * sample)


# (sampler, eta, prediction_type, steps, clip_sample_range): sum of the coordinates, mean of their absolute values.
GOLDEN = {
    ("ddpm", 0.0, "epsilon", 100, 1.0): (6.75623671, 0.342334893),
    ("ddpm", 0.0, "v_prediction", 10, None): (-7.9243647, 0.203986712),
    ("ddim", 0.0, "sample", 10, None): (-17.9972419, 1.33682876),
    ("ddim", 0.0, "epsilon", 7, 1.0): (-3.10564577, 0.333338546),
    ("ddim", 0.5, "v_prediction", 10, 1.0): (-6.52083381, 0.166048392),
    ("dpm++", 0.0, "sample", 10, None): (-19.7209399, 1.39044473),
    ("dpm++", 0.0, "v_prediction", 10, None): (-2.06140944, 0.138763297),
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_golden_numbers(case):
    sampler, eta, prediction_type, steps, clip = case
    table = step_table(NoiseSchedule(100), steps, sampler=sampler, eta=eta, prediction_type=prediction_type)
    poses = run_chain(table, dummy_model, numpy_noise(steps), clip=clip)
    total, mean = GOLDEN[case]
    assert poses.sum().item() == pytest.approx(total, rel=1e-6)
    assert poses.abs().mean().item() == pytest.approx(mean, rel=1e-6)


def test_hypotheses_follow_their_noise():
    table = step_table(NoiseSchedule(100), 10, sampler="ddpm", prediction_type="v_prediction")
    one, same, other = (run_chain(table, dummy_model, numpy_noise(10, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 0.1
    assert (one[0, 0] - one[0, 1]).abs().max() > 0.1
    # A hypothesis does not depend on those beside it.
    alone = run_chain(table, dummy_model, numpy_noise(10)[:, 1:, 2:])
    torch.testing.assert_close(alone, one[1:, 2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_float32_chain(sampler, prediction_type):
    table = step_table(NoiseSchedule(100), 10, sampler=sampler, prediction_type=prediction_type)
    exact = run_chain(table, gaussian_model(prediction_type), numpy_noise(10))
    poses = run_chain(table, gaussian_model(prediction_type), numpy_noise(10), dtype=torch.float32)
    assert poses.dtype == torch.float32
    torch.testing.assert_close(poses.double(), exact, rtol=0, atol=1e-6)
