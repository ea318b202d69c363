"""The step tables against the schedulers of diffusers, under the conditions where both take the same grid.

The variances of diffusers are float32; ours are put into its schedulers in float64, so that what is compared is the
samplers' arithmetic and not the rounding of the schedule.
"""

import numpy as np
import pytest
import torch

from diffupose.reference.reverse_step import reverse_step
from diffupose.schedule import NoiseSchedule, step_table

pytest.importorskip("diffusers")
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

TOTAL = 100
SHAPE = (2, 3, 17, 3)  # [B, H, J, 3]
CLIP_RANGE = 0.6

beta_schedules = pytest.mark.parametrize("beta_schedule", ["cosine", "linear"])
prediction_types = pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
step_counts = pytest.mark.parametrize("steps", [5, 10, 100])
spacings = pytest.mark.parametrize("spacing", ["trailing", "leading"])
clips = pytest.mark.parametrize("clip", [None, CLIP_RANGE], ids=["free", "clipped"])


class Model:
    """A small fixed nonlinear function of (x, t), in float64."""

    def __init__(self):
        rng = np.random.default_rng(7)
        self.inner = torch.from_numpy(rng.normal(0.0, 0.6, (3, 8)))
        self.outer = torch.from_numpy(rng.normal(0.0, 0.4, (8, 3)))
        self.phase = torch.from_numpy(rng.normal(0.0, 1.0, 8))

    def __call__(self, sample, t):
        return torch.tanh(sample @ self.inner + self.phase * (1 + t / TOTAL)) @ self.outer  # [B, H, J, 3]


def make_scheduler(scheduler_class, schedule, **config):
    if schedule.beta_schedule == "cosine":
        config["beta_schedule"] = "squaredcos_cap_v2"
    else:
        config["trained_betas"] = schedule.betas.tolist()
    scheduler = scheduler_class(num_train_timesteps=TOTAL, steps_offset=0, **config)
    # Before they are replaced, its own variances must be ours up to float32.
    own = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(own, schedule.alphas_cumprod, rtol=1e-4)
    scheduler.betas = torch.from_numpy(schedule.betas)
    scheduler.alphas = torch.from_numpy(schedule.alphas)
    scheduler.alphas_cumprod = cumprod = torch.from_numpy(schedule.alphas_cumprod)
    if scheduler_class is DPMSolverMultistepScheduler:
        scheduler.alpha_t, scheduler.sigma_t = cumprod.sqrt(), (1 - cumprod).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
        scheduler.sigmas = ((1 - cumprod) / cumprod).sqrt()
    return scheduler


def make_noise(steps):
    """Return x_T and one noise per step."""
    noise = torch.from_numpy(np.random.default_rng(steps).standard_normal((steps + 1, *SHAPE)))
    return noise[0], noise[1:]


def assert_same_chain(table, scheduler, their_step, tolerance, clip=None):
    """Run both chains freely and compare every ``prev_sample``, relative to its largest coordinate."""
    model = Model()
    scheduler.set_timesteps(table.num_inference_steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    coefficients = torch.from_numpy(table.coefficients)
    start, noise = make_noise(table.num_inference_steps)
    ours = theirs = start
    x0 = None
    clipped = []
    for step, t in enumerate(table.timesteps.tolist()):
        ours, x0 = reverse_step(ours, model(ours, t), coefficients, step, x0, noise[step], clip)
        theirs = their_step(model(theirs, t), t, theirs, noise[step])
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"step {step}: {error:.1e}"
        clipped.append(x0.abs() == clip)
    assert ours.dtype == theirs.dtype == torch.float64
    if clip is not None:
        share = torch.stack(clipped).double().mean()
        assert 0.02 < share < 0.98, f"clipping must matter, but not everywhere: {share:.3f}"


@beta_schedules
@prediction_types
@step_counts
@spacings
@clips
def test_ddpm(monkeypatch, beta_schedule, prediction_type, steps, spacing, clip):
    schedule = NoiseSchedule(TOTAL, beta_schedule)
    scheduler = make_scheduler(
        DDPMScheduler,
        schedule,
        variance_type="fixed_small",
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )

    def their_step(model_output, t, sample, noise):
        # DDPMScheduler.step draws its noise itself. It keeps the variance above 1e-20: in a last step from t > 0, 1e-10
        # of this noise remains and takes up most of the tolerance.
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise)
        return scheduler.step(model_output, t, sample).prev_sample

    table = step_table(schedule, steps, sampler="ddpm", prediction_type=prediction_type, timestep_spacing=spacing)
    assert_same_chain(table, scheduler, their_step, 1e-9, clip)


@beta_schedules
@prediction_types
@step_counts
@spacings
@clips
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(beta_schedule, prediction_type, steps, spacing, clip, eta):
    schedule = NoiseSchedule(TOTAL, beta_schedule)
    scheduler = make_scheduler(
        DDIMScheduler,
        schedule,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )

    def their_step(model_output, t, sample, noise):
        return scheduler.step(
            model_output,
            t,
            sample,
            eta=eta,
            use_clipped_model_output=clip is not None,
            variance_noise=noise,
        ).prev_sample

    table = step_table(
        schedule, steps, sampler="ddim", eta=eta, prediction_type=prediction_type, timestep_spacing=spacing
    )
    assert_same_chain(table, scheduler, their_step, 1e-9, clip)


# It converts float64 tensors to NumPy in a way that NumPy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@beta_schedules
@prediction_types
@step_counts
def test_dpm_solver(beta_schedule, prediction_type, steps):
    schedule = NoiseSchedule(TOTAL, beta_schedule)
    scheduler = make_scheduler(
        DPMSolverMultistepScheduler,
        schedule,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )

    def their_step(model_output, t, sample, noise):
        return scheduler.step(model_output, t, sample).prev_sample

    table = step_table(schedule, steps, sampler="dpm++", prediction_type=prediction_type, timestep_spacing="trailing")
    # Its sigmas and its samples inside a step are float32.
    assert_same_chain(table, scheduler, their_step, 1e-4)


@beta_schedules
def test_add_noise_and_velocity(beta_schedule):
    schedule = NoiseSchedule(TOTAL, beta_schedule)
    scheduler = make_scheduler(DDPMScheduler, schedule)
    timesteps = torch.arange(TOTAL)
    clean, noise = torch.randn(2, TOTAL, 17, 3, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.add_noise(clean, noise, timesteps), scheduler.add_noise(clean, noise, timesteps), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        schedule.get_velocity(clean, noise, timesteps),
        scheduler.get_velocity(clean, noise, timesteps),
        rtol=0,
        atol=1e-12,
    )


def test_linear_defaults():
    """At T = 1000 the linear schedule is the one of diffusers (and of Ho et al. 2020)."""
    np.testing.assert_allclose(NoiseSchedule(1000, "linear").betas, DDPMScheduler().betas.double().numpy(), rtol=1e-6)
