import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffupose.schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    inference_timesteps,
    step_table,
)

SAMPLER_ETA = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm++", 0.0)]


def cosine_signal(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize("total", [4, 100, 1000])
def test_cosine(total):
    """Eq. 11: alphas_cumprod is f(t) / f(0), until the last beta meets its limit."""
    schedule = NoiseSchedule(total)
    expected = [cosine_signal((t + 1) / total) / cosine_signal(0.0) for t in range(total - 1)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected, rtol=1e-10)
    # cos(pi / 2) = 0 would end the chain without any signal: the last beta would be 1.
    assert schedule.betas[-1] == 0.999
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.001 * expected[-1], rel=1e-10)
    betas = [1 - cosine_signal((t + 1) / total) / cosine_signal(t / total) for t in range(total - 1)]
    np.testing.assert_allclose(schedule.betas[:-1], betas, rtol=1e-9)


def test_cosine_at_100_steps():
    schedule = NoiseSchedule(100, "cosine")
    assert schedule.alphas_cumprod[-1] == pytest.approx(2.429e-7, rel=1e-3)
    assert schedule.alphas_cumprod[-2] == pytest.approx(2.429e-4, rel=1e-3)
    assert schedule.alphas_cumprod[49] == pytest.approx(0.4938, abs=1e-4)
    assert schedule.betas[0] == pytest.approx(6.313e-4, rel=1e-3)


def test_cosine_offset():
    schedule = NoiseSchedule(10, cosine_s=0.1)
    expected = (math.cos(0.6 / 1.1 * math.pi / 2) / math.cos(0.1 / 1.1 * math.pi / 2)) ** 2
    assert schedule.alphas_cumprod[4] == pytest.approx(expected, rel=1e-12)


def test_linear_scales_with_the_number_of_steps():
    long, short = NoiseSchedule(1000, "linear"), NoiseSchedule(100, "linear")
    np.testing.assert_allclose(long.betas[[0, 1, -1]], [1e-4, 1e-4 + 0.0199 / 999, 0.02], rtol=1e-12)
    np.testing.assert_allclose(short.betas[[0, 1, -1]], [1e-3, 1e-3 + 0.199 / 99, 0.2], rtol=1e-12)
    # The value at the end of the chain of Ho et al. 2020, and about as little at T = 100.
    assert long.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert 1e-5 < short.alphas_cumprod[-1] < 4.1e-5


def test_linear_betas_are_limited():
    betas = NoiseSchedule(10, "linear").betas
    steps = [0.01 + i * 1.99 / 9 for i in range(10)]
    assert steps[4] < 0.999 < steps[5]
    np.testing.assert_allclose(betas, [*steps[:5], *[0.999] * 5], rtol=1e-12)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 10, 100, 1000])
def test_arrays(beta_schedule, total):
    schedule = NoiseSchedule(total, beta_schedule)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(schedule, name).shape == (total,), name
        assert getattr(schedule, name).dtype == np.float64, name
    assert schedule.num_train_timesteps == total
    assert schedule.beta_schedule == beta_schedule
    assert (schedule.betas > 0).all()
    assert (schedule.betas <= 0.999).all()
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert schedule.alphas.tolist() == [1 - beta for beta in schedule.betas]
    products = [math.prod(schedule.alphas[: t + 1]) for t in range(total)]
    np.testing.assert_allclose(schedule.alphas_cumprod, products, rtol=1e-12)


def test_schedule_errors():
    for total in (0, -1):
        with pytest.raises(ValueError, match=f"num_train_timesteps must be at least 1, got {total}"):
            NoiseSchedule(total)
    with pytest.raises(ValueError, match="beta_schedule must be one of cosine, linear, got 'quadratic'"):
        NoiseSchedule(100, "quadratic")


@pytest.mark.parametrize("shape", [(3,), (3, 17), (3, 2, 17, 3)], ids=str)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_add_noise_and_velocity(beta_schedule, shape):
    """Each sample has its own timestep; x_t and v are the (x_0, noise) plane turned by an angle."""
    schedule = NoiseSchedule(100, beta_schedule)
    timesteps = torch.tensor([99, 0, 41])
    clean, noise = torch.randn(2, *shape, dtype=torch.float64)
    noisy = schedule.add_noise(clean, noise, timesteps)
    velocity = schedule.get_velocity(clean, noise, timesteps)
    assert noisy.shape == velocity.shape == shape
    for row, t in enumerate((99, 0, 41)):
        signal = math.sqrt(math.prod(schedule.alphas[: t + 1]))
        sigma = math.sqrt(1 - signal**2)
        torch.testing.assert_close(noisy[row], signal * clean[row] + sigma * noise[row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(velocity[row], signal * noise[row] - sigma * clean[row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(signal * noisy[row] - sigma * velocity[row], clean[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sigma * noisy[row] + signal * velocity[row], noise[row], rtol=1e-9, atol=1e-9)


def test_add_noise_keeps_the_dtype():
    schedule = NoiseSchedule(100)
    clean, noise = torch.randn(2, 4, 17, 3)
    timesteps = torch.tensor([0, 98, 50, 99], dtype=torch.int32)
    noisy = schedule.add_noise(clean, noise, timesteps)
    assert noisy.dtype == schedule.get_velocity(clean, noise, timesteps).dtype == torch.float32
    exact = schedule.add_noise(clean.double(), noise.double(), timesteps)
    # The variances are computed in float64 first: 1 - alphas_cumprod in float32 would lose three digits at t = 0.
    torch.testing.assert_close(noisy.double(), exact, rtol=3e-7, atol=3e-7)


def test_add_noise_refuses_a_timestep_past_the_end():
    schedule = NoiseSchedule(100)
    with pytest.raises(IndexError):
        schedule.add_noise(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([100]))


# fmt: off
GRIDS = [
    ("trailing", 100, 1, [99]),
    ("trailing", 100, 2, [99, 49]),
    ("trailing", 100, 3, [99, 66, 32]),
    ("trailing", 100, 5, [99, 79, 59, 39, 19]),
    ("trailing", 100, 7, [99, 85, 70, 56, 42, 28, 13]),
    # 87.5, 62.5, 37.5 and 12.5 go to the even neighbour.
    ("trailing", 100, 8, [99, 87, 74, 61, 49, 37, 24, 11]),
    # 62.5 is a half although 100 / 24 is no binary fraction.
    ("trailing", 100, 24, [99, 95, 91, 87, 82, 78, 74, 70, 66, 61, 57, 53,
                           49, 45, 41, 37, 32, 28, 24, 20, 16, 11, 7, 3]),
    ("trailing", 10, 9, [9, 8, 7, 6, 5, 3, 2, 1, 0]),
    ("trailing", 4, 4, [3, 2, 1, 0]),
    ("leading", 100, 1, [0]),
    ("leading", 100, 3, [66, 33, 0]),
    ("leading", 100, 5, [80, 60, 40, 20, 0]),
    ("leading", 100, 7, [84, 70, 56, 42, 28, 14, 0]),
    ("leading", 10, 6, [5, 4, 3, 2, 1, 0]),
    ("leading", 4, 4, [3, 2, 1, 0]),
    ("linspace", 100, 1, [99]),
    ("linspace", 100, 2, [99, 0]),
    ("linspace", 100, 3, [99, 50, 0]),
    ("linspace", 100, 5, [99, 74, 50, 25, 0]),
    ("linspace", 100, 7, [99, 82, 66, 50, 33, 16, 0]),
    ("linspace", 10, 9, [9, 8, 7, 6, 4, 3, 2, 1, 0]),
    ("linspace", 4, 4, [3, 2, 1, 0]),
    ("trailing", 1, 1, [0]),
    ("leading", 1, 1, [0]),
    ("linspace", 1, 1, [0]),
    ("quadratic", 100, 1, [99]),
    ("quadratic", 100, 2, [99, 24]),
    ("quadratic", 100, 5, [99, 63, 35, 15, 3]),
    ("quadratic", 1000, 5, [999, 639, 359, 159, 39]),
    ("quadratic", 10, 6, [9, 6, 3, 2, 1, 0]),
    ("quadratic", 4, 4, [3, 2, 1, 0]),
    ("quadratic", 1, 1, [0]),
]
# fmt: on


@pytest.mark.parametrize(
    ("spacing", "total", "steps", "expected"), GRIDS, ids=lambda x: "" if isinstance(x, list) else str(x)
)
def test_timesteps(spacing, total, steps, expected):
    grid = inference_timesteps(total, steps, spacing)
    assert grid.tolist() == expected
    assert grid.dtype == np.int64


def test_timesteps_default_to_trailing():
    assert inference_timesteps(100, 5).tolist() == [99, 79, 59, 39, 19]
    assert inference_timesteps(100, np.int64(5)).tolist() == [99, 79, 59, 39, 19]
    assert step_table(NoiseSchedule(100), 5).timesteps.tolist() == [99, 79, 59, 39, 19]


def test_trailing_timesteps_round_halves_to_even():
    for total in (25, 29, 58, 100, 110):
        for steps in range(1, total + 1):
            exact = [round(Fraction((steps - i) * total, steps)) - 1 for i in range(steps)]
            assert inference_timesteps(total, steps, "trailing").tolist() == exact, (total, steps)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_timesteps_descend_without_repeats(spacing):
    assert inference_timesteps(100, 100, spacing).tolist() == list(range(99, -1, -1))
    for steps in range(1, 101):
        grid = inference_timesteps(100, steps, spacing)
        assert grid.shape == (steps,)
        assert (np.diff(grid) < 0).all()
        assert grid[-1] >= 0
        assert grid[0] <= 99


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [0, 101, -1, True, False, 5.0, np.float64(5), "5", None], ids=repr)
def test_timesteps_errors(spacing, steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer between 1 and 100, got "):
        inference_timesteps(100, steps, spacing)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer between 1 and 100, got "):
        step_table(NoiseSchedule(100), steps, timestep_spacing=spacing)


def test_step_table_errors():
    schedule = NoiseSchedule(100)
    with pytest.raises(ValueError, match=r"sampler must be one of ddpm, ddim, dpm\+\+, got 'euler'"):
        step_table(schedule, 5, sampler="euler")
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample, v_prediction, got 'noise'"):
        step_table(schedule, 5, prediction_type="noise")
    with pytest.raises(
        ValueError, match="timestep_spacing must be one of trailing, leading, linspace, quadratic, got 'karras'"
    ):
        step_table(schedule, 5, timestep_spacing="karras")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
            step_table(schedule, 5, sampler="ddim", eta=eta)
    for sampler in ("ddpm", "dpm++"):
        with pytest.raises(ValueError, match=r"be 0 unless sampler is ddim, got 0\.5 with"):
            step_table(schedule, 5, sampler=sampler, eta=0.5)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_every_prediction_type_gives_x0(beta_schedule):
    schedule = NoiseSchedule(100, beta_schedule)
    clean, noise = torch.randn(2, 1, 17, 3, dtype=torch.float64)
    for prediction_type in PREDICTION_TYPES:
        table = step_table(schedule, 10, prediction_type=prediction_type)
        for step, t in enumerate(table.timesteps):
            time = torch.tensor([t])
            noisy = schedule.add_noise(clean, noise, time)
            velocity = schedule.get_velocity(clean, noise, time)
            out = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
            p, q = table.coefficients[step, :2]
            torch.testing.assert_close(p * noisy + q * out, clean, rtol=1e-8, atol=1e-8)
        if prediction_type == "sample":
            assert table.coefficients[:, :2].tolist() == [[0.0, 1.0]] * 10


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [2, 7, 10, 100])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLER_ETA)
def test_a_perfect_model_keeps_the_marginals(sampler, eta, beta_schedule, steps, spacing):
    """With the true x0, x_prev has the mean sqrt(a') x0 and the variance 1 - a' of the grid's actual next timestep."""
    schedule = NoiseSchedule(100, beta_schedule)
    table = step_table(schedule, steps, sampler=sampler, eta=eta, timestep_spacing=spacing)
    assert table.timesteps.tolist() == inference_timesteps(100, steps, spacing).tolist()
    cumprod = schedule.alphas_cumprod[table.timesteps]
    _, _, c_x, c_0, c_1, s = table.coefficients[:-1].T
    np.testing.assert_allclose(c_x * np.sqrt(cumprod[:-1]) + c_0 + c_1, np.sqrt(cumprod[1:]), rtol=1e-9)
    np.testing.assert_allclose(c_x**2 * (1 - cumprod[:-1]) + s**2, 1 - cumprod[1:], rtol=1e-9)
    assert (s > 0).all() if sampler == "ddpm" or eta > 0 else (s == 0).all()
    assert (c_1[1:] < 0).all() if sampler == "dpm++" else (c_1 == 0).all()
    assert c_1[0] == 0


@pytest.mark.parametrize("spacing", ["trailing", "quadratic"])
@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_analytic_variance_keeps_the_marginals_of_a_model_that_predicts_the_mean(sampler, eta, steps, spacing):
    """Data of variance v, whose best prediction is a share of x_t: every x_prev has variance a' v + 1 - a'."""
    schedule, v = NoiseSchedule(100), 0.2
    a = schedule.alphas_cumprod
    error = v * (1 - a) / (a * v + 1 - a)
    table = step_table(schedule, steps, sampler=sampler, eta=eta, timestep_spacing=spacing, prediction_error=error)
    plain = step_table(schedule, steps, sampler=sampler, eta=eta, timestep_spacing=spacing)
    a = a[table.timesteps]
    share = np.sqrt(a) * v / (a * v + 1 - a)  # E[x0 | x_t] = share x_t
    _, _, c_x, c_0, _, s = table.coefficients.T
    before, after = a * v + 1 - a, np.append(a[1:] * v + 1 - a[1:], v - error[table.timesteps[-1]])
    np.testing.assert_allclose((c_x + c_0 * share) ** 2 * before + s**2, after, rtol=1e-9)
    assert (plain.coefficients[:, :5] == table.coefficients[:, :5]).all()
    assert (plain.coefficients[:-1, 5] < s[:-1]).all() and s[-1] == 0
    assert table.noise_scale is None


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_analytic_variance_per_joint_and_axis(sampler, eta, steps):
    """Every element has the deviation that it would have alone; s is their root mean square."""
    schedule = NoiseSchedule(100)
    error = np.random.default_rng(0).uniform(0.0, 0.3, (100, 17, 3))
    error[:, 0] = 0.0  # the root is known
    table = step_table(schedule, steps, sampler=sampler, eta=eta, prediction_error=error)
    assert table.noise_scale.shape == (steps, 17, 3)
    deviation = table.coefficients[:, 5, None, None] * table.noise_scale
    for joint, axis in ((0, 0), (3, 1), (16, 2)):
        alone = step_table(schedule, steps, sampler=sampler, eta=eta, prediction_error=error[:, joint, axis])
        np.testing.assert_allclose(deviation[:, joint, axis], alone.coefficients[:, 5], rtol=1e-12, atol=1e-15)
        assert (alone.coefficients[:, :5] == table.coefficients[:, :5]).all()
    np.testing.assert_allclose((table.noise_scale**2).mean(axis=(1, 2)), 1.0, rtol=1e-12)
    assert table.coefficients[-1, 5] == 0.0
    assert table.noise_scale_tensor().dtype == torch.float32


def test_a_model_without_error_adds_no_noise():
    table = step_table(NoiseSchedule(100), 5, prediction_error=np.zeros((100, 17, 3)))
    assert (table.coefficients[:, 5] == 0).all() and np.isfinite(table.noise_scale).all()


def test_analytic_variance_errors():
    schedule = NoiseSchedule(100)
    wrong = r"prediction_error must have shape \[100\] or \[100, J, 3\] .* got \(99,\) with ddim"
    with pytest.raises(ValueError, match=wrong):
        step_table(schedule, 5, prediction_error=np.ones(99))
    with pytest.raises(ValueError, match=r"go with sampler ddpm or ddim, got \(100,\) with dpm"):
        step_table(schedule, 5, sampler="dpm++", prediction_error=np.ones(100))


def test_ddpm_is_the_posterior_of_eq_3():
    schedule = NoiseSchedule(100)
    table = step_table(schedule, 100, sampler="ddpm")
    for t in (99, 57, 1):
        beta, alpha = schedule.betas[t], schedule.alphas[t]
        now, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
        expected = [
            math.sqrt(alpha) * (1 - before) / (1 - now),
            math.sqrt(before) * beta / (1 - now),
            0.0,
            math.sqrt(beta * (1 - before) / (1 - now)),
        ]
        np.testing.assert_allclose(table.coefficients[99 - t, 2:], expected, rtol=1e-9)


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_ddim_with_full_noise_is_ddpm(beta_schedule, steps):
    schedule = NoiseSchedule(100, beta_schedule)
    ddim = step_table(schedule, steps, sampler="ddim", eta=1.0)
    ddpm = step_table(schedule, steps, sampler="ddpm")
    np.testing.assert_allclose(ddim.coefficients, ddpm.coefficients, rtol=1e-9, atol=1e-12)


def test_ddim_noise_is_proportional_to_eta():
    schedule = NoiseSchedule(100)
    full = step_table(schedule, 10, sampler="ddim", eta=1.0).coefficients[:, 5]
    quarter = step_table(schedule, 10, sampler="ddim", eta=0.25).coefficients[:, 5]
    np.testing.assert_allclose(quarter, 0.25 * full, rtol=1e-12)


def test_ddim_without_noise_is_the_first_order_solver():
    """DPM-Solver++ of order 1, its first step, is DDIM (Lu et al. 2022)."""
    schedule = NoiseSchedule(100)
    ddim, solver = step_table(schedule, 10, sampler="ddim"), step_table(schedule, 10, sampler="dpm++")
    np.testing.assert_allclose(solver.coefficients[0], ddim.coefficients[0], rtol=1e-9)
    assert np.abs(solver.coefficients[1] - ddim.coefficients[1]).max() > 1e-3


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLER_ETA)
def test_the_last_row_is_x0(sampler, eta, beta_schedule, spacing):
    for steps in (1, 2, 7, 100):
        for prediction_type in PREDICTION_TYPES:
            table = step_table(
                NoiseSchedule(100, beta_schedule),
                steps,
                sampler=sampler,
                eta=eta,
                prediction_type=prediction_type,
                timestep_spacing=spacing,
            )
            assert table.coefficients[-1, 2:].tolist() == [0.0, 1.0, 0.0, 0.0]
            assert table.tensor()[-1, 2:].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_step_table_as_tensor():
    table = step_table(NoiseSchedule(100), 10, sampler="dpm++", prediction_type="v_prediction")
    assert table.num_inference_steps == 10
    assert table.coefficients.shape == (10, 6)
    assert table.coefficients.dtype == np.float64
    assert table.timesteps.dtype == np.int64
    tensor = table.tensor()
    assert tensor.shape == (10, 6)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.double(), torch.from_numpy(table.coefficients), rtol=1e-7, atol=0.0)
    # A term is skipped where its coefficient is 0, so float32 must keep exactly these zeros.
    assert ((tensor == 0).numpy() == (table.coefficients == 0)).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.timesteps = table.timesteps


def test_step_table_defaults():
    schedule = NoiseSchedule(100)
    expected = step_table(schedule, 10, sampler="ddim", eta=0.0, prediction_type="epsilon", timestep_spacing="trailing")
    assert step_table(schedule, 10).coefficients.tolist() == expected.coefficients.tolist()
