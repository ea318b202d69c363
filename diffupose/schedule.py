"""Noise schedules, and samplers as tables of coefficients.

Every sampler is one row ``p, q, c_x, c_0, c_1, s`` per step:

    x0     = p x_t + q out                      (clipped if the model clips)
    x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s z

so the code that runs a step (``reverse_step``) knows no sampler by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffupose.errors import check_choice

BetaSchedule = Literal["cosine", "linear"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
Sampler = Literal["ddpm", "ddim", "dpm++"]
TimestepSpacing = Literal["trailing", "leading", "linspace", "quadratic"]
Variance = Literal["fixed_small", "analytic"]

BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
TIMESTEP_SPACINGS: tuple[TimestepSpacing, ...] = get_args(TimestepSpacing)
VARIANCES: tuple[Variance, ...] = get_args(Variance)


class NoiseSchedule:
    """Variances of the forward process q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, 1 - alphas_cumprod_t) (eq. 2).

    Timesteps run from 0 to T - 1, as in diffusers and in the released code (the paper counts 1 to T).

    Args:
        num_train_timesteps: T.
        beta_schedule: ``"cosine"`` (eq. 11, betas at most 0.999) or ``"linear"`` (1e-4 to 0.02 at T = 1000, scaled by
            1000 / T so that the end of the chain is as noisy).
        cosine_s: Offset s of eq. 11.

    Attributes:
        betas, alphas, alphas_cumprod: float64 arrays of shape ``[T]``.
    """

    def __init__(
        self, num_train_timesteps: int = 100, beta_schedule: BetaSchedule = "cosine", cosine_s: float = 0.008
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        self.num_train_timesteps = num_train_timesteps
        self.beta_schedule = beta_schedule
        if beta_schedule == "cosine":
            time = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
            signal = np.cos((time + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2
            self.betas = np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)
        else:
            scale = 1000.0 / num_train_timesteps
            self.betas = np.minimum(np.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps), 0.999)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(self.alphas)
        self._cumprods: dict[torch.device, Tensor] = {}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise (eq. 2).

        Args:
            original_samples: x_0 of shape ``[B, ...]``.
            noise: Standard normal, same shape.
            timesteps: Integers in [0, T), shape ``[B]``.
        """
        signal, sigma = self._signal_and_sigma(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(alphas_cumprod_t) noise - sqrt(1 - alphas_cumprod_t) x_0 (Salimans and Ho 2022)."""
        signal, sigma = self._signal_and_sigma(timesteps, sample)
        return signal * noise - sigma * sample

    def _cumprod_on(self, device: torch.device) -> Tensor:
        # Copied once: a copy from the host would stall a GPU at every step, and a CUDA graph has none.
        if device not in self._cumprods:
            self._cumprods[device] = torch.as_tensor(self.alphas_cumprod, device=device)
        return self._cumprods[device]

    def _signal_and_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cumprod = self._cumprod_on(timesteps.device)[timesteps]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return cumprod.sqrt().to(like.dtype).reshape(shape), (1 - cumprod).sqrt().to(like.dtype).reshape(shape)


def inference_timesteps(
    num_train_timesteps: int, num_inference_steps: int, spacing: TimestepSpacing = "trailing"
) -> np.ndarray:
    """Return the descending grid of timesteps, shape ``[S]``, int64.

    ``trailing``: round_half_even((S - i) T / S) - 1; ``leading``: (S - 1 - i) (T // S); ``linspace``: from T - 1 to 0;
    ``quadratic``: round_half_even((S - i)^2 T / S^2) - 1, at least S - i - 1 (dense near the data, Song et al. 2021).

    Raises:
        ValueError: If S is not in [1, T] or the spacing is unknown.
    """
    check_choice("timestep_spacing", spacing, TIMESTEP_SPACINGS)
    total, steps = num_train_timesteps, num_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= total:
        raise ValueError(f"num_inference_steps must be an integer between 1 and {total}, got {steps!r}")
    grid: np.ndarray
    if spacing == "trailing":
        # The product is exact, so one rounding is left and a half stays a half: total / steps first would lose it.
        grid = np.round((steps - np.arange(steps)) * total / steps) - 1
    elif spacing == "quadratic":
        left = steps - np.arange(steps)
        grid = np.maximum(np.round(left**2 * total / steps**2), left) - 1
    elif spacing == "leading":
        grid = (steps - 1 - np.arange(steps)) * (total // steps)
    else:
        grid = np.round(np.linspace(total - 1, 0, steps))
    return grid.astype(np.int64)


@dataclass(frozen=True)
class StepTable:
    """A sampler as numbers.

    Attributes:
        coefficients: ``[S, 6]`` float64, columns p, q, c_x, c_0, c_1, s.
        timesteps: ``[S]`` int64, descending.
        noise_scale: ``[S, J, 3]`` float64 or None: z counts ``s noise_scale[joint, axis]``, whose mean square over
            joints and axes is s^2; None is 1 everywhere.
    """

    coefficients: np.ndarray
    timesteps: np.ndarray
    noise_scale: np.ndarray | None = None

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.coefficients.shape != (steps, 6):
            raise ValueError(f"coefficients must have shape [{steps}, 6], got {self.coefficients.shape}")
        scale = self.noise_scale
        if scale is not None and (scale.ndim != 3 or len(scale) != steps or scale.shape[2] != 3):
            raise ValueError(f"noise_scale must have shape [{steps}, J, 3], got {scale.shape}")

    @property
    def num_inference_steps(self) -> int:
        """Number of steps S, which is the number of calls of the network."""
        return len(self.timesteps)

    def tensor(self) -> Tensor:
        """Return the coefficients as a float32 CPU tensor of shape ``[S, 6]``: what ``reverse_step`` takes."""
        return torch.from_numpy(self.coefficients.astype(np.float32))

    def noise_scale_tensor(self) -> Tensor | None:
        """Return the noise scale as a float32 CPU tensor of shape ``[S, J, 3]``, or None."""
        return None if self.noise_scale is None else torch.from_numpy(self.noise_scale.astype(np.float32))


def step_table(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    prediction_type: PredictionType = "epsilon",
    timestep_spacing: TimestepSpacing = "trailing",
    prediction_error: np.ndarray | None = None,
) -> StepTable:
    """Return the table of a sampler, computed in float64.

    Args:
        schedule: The schedule the model was trained with.
        num_inference_steps: S, at most T.
        sampler: ``"ddpm"`` (ancestral, posterior variance "fixed small", eq. 3), ``"ddim"`` (Song et al. 2021) or
            ``"dpm++"`` (DPM-Solver++ 2M, midpoint, Lu et al. 2022).
        eta: Share of fresh noise in DDIM, 0 (deterministic) to 1 (as much as DDPM); 0 for the other samplers.
        prediction_type: What the network's output means.
        timestep_spacing: The grid; each step goes to the grid's actual next timestep, the last one to clean data.
        prediction_error: Mean squared error of the predicted x0 at each timestep, ``[T]`` or per joint and axis
            ``[T, J, 3]``, in data units: variance ``"analytic"``. A step takes the mean of x0 for x0, and so loses
            c_0^2 times the posterior variance of x0. That is added to s^2 (Bao et al. 2022): without it, few steps give
            too little spread. It is largest for depth and the ends of the limbs. None is ``"fixed_small"``: nothing is
            added.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if not 0.0 <= eta <= 1.0 or (eta > 0 and sampler != "ddim"):
        raise ValueError(f"eta must lie in [0, 1] and be 0 unless sampler is ddim, got {eta!r} with {sampler}")
    if prediction_error is not None and (
        sampler == "dpm++"
        or prediction_error.ndim not in (1, 3)
        or len(prediction_error) != schedule.num_train_timesteps
    ):
        total = schedule.num_train_timesteps
        raise ValueError(
            f"prediction_error must have shape [{total}] or [{total}, J, 3] and go with sampler ddpm or ddim, got "
            f"{prediction_error.shape} with {sampler}"
        )
    timesteps = inference_timesteps(schedule.num_train_timesteps, num_inference_steps, timestep_spacing)
    cumprod = np.append(schedule.alphas_cumprod[timesteps], 1.0)  # the state after the last step is clean
    rows = np.zeros((num_inference_steps, 6))
    for step in range(num_inference_steps):
        row = rows[step]
        row[0:2] = _prediction_to_x0(prediction_type, cumprod[step])
        if step == num_inference_steps - 1:
            row[2:6] = 0.0, 1.0, 0.0, 0.0
        elif sampler == "ddpm":
            row[2:6] = _ddpm_step(cumprod[step], cumprod[step + 1])
        elif sampler == "ddim":
            row[2:6] = _ddim_step(cumprod[step], cumprod[step + 1], eta)
        else:
            row[2:6] = _dpm_solver_step(cumprod[step], cumprod[step + 1], cumprod[step - 1] if step else None)
    noise_scale = None if prediction_error is None else _add_variance(rows, prediction_error[timesteps])
    return StepTable(coefficients=rows, timesteps=timesteps, noise_scale=noise_scale)


def _add_variance(rows: np.ndarray, error: np.ndarray) -> np.ndarray | None:
    """Add c_0^2 times the error ``[S]`` or ``[S, J, 3]`` to every s^2 but the last; return the noise scale."""
    shape = (-1,) + (1,) * (error.ndim - 1)
    variance = rows[:, 5].reshape(shape) ** 2 + rows[:, 3].reshape(shape) ** 2 * error
    mean = variance.reshape(len(rows), -1).mean(axis=1)
    rows[:-1, 5] = np.sqrt(mean[:-1])
    if error.ndim == 1:
        return None
    scale = np.ones_like(error)
    scale[:-1] = np.sqrt(variance[:-1] / np.where(mean > 0, mean, 1.0)[:-1].reshape(shape))
    return scale


def _prediction_to_x0(prediction_type: PredictionType, cumprod: float) -> tuple[float, float]:
    """Return p and q of ``x0 = p x_t + q output``, where ``cumprod`` is the alphas_cumprod of the timestep."""
    signal, sigma = math.sqrt(cumprod), math.sqrt(1.0 - cumprod)
    if prediction_type == "epsilon":
        return 1.0 / signal, -sigma / signal
    return (0.0, 1.0) if prediction_type == "sample" else (signal, -sigma)


def _ddpm_step(cumprod: float, cumprod_next: float) -> tuple[float, float, float, float]:
    """Posterior mean and variance of eq. 3, from one grid point to the next."""
    alpha = cumprod / cumprod_next
    beta = 1.0 - alpha
    c_x = math.sqrt(alpha) * (1.0 - cumprod_next) / (1.0 - cumprod)
    c_0 = math.sqrt(cumprod_next) * beta / (1.0 - cumprod)
    return c_x, c_0, 0.0, math.sqrt(beta * (1.0 - cumprod_next) / (1.0 - cumprod))


def _ddim_step(cumprod: float, cumprod_next: float, eta: float) -> tuple[float, float, float, float]:
    """Epsilon is taken back from the (clipped) x0, so that a clipped step stays on the line through it."""
    variance = (1.0 - cumprod_next) / (1.0 - cumprod) * (1.0 - cumprod / cumprod_next)
    s = eta * math.sqrt(variance)
    c_x = math.sqrt(1.0 - cumprod_next - s * s) / math.sqrt(1.0 - cumprod)
    return c_x, math.sqrt(cumprod_next) - c_x * math.sqrt(cumprod), 0.0, s


def _dpm_solver_step(
    cumprod: float, cumprod_next: float, cumprod_last: float | None
) -> tuple[float, float, float, float]:
    """Second-order multistep in half log-SNR; the first step has no history and is first order."""

    def half_log_snr(value: float) -> float:
        return 0.5 * (math.log(value) - math.log1p(-value))

    h = half_log_snr(cumprod_next) - half_log_snr(cumprod)
    c_x = math.sqrt((1.0 - cumprod_next) / (1.0 - cumprod))
    gain = -math.sqrt(cumprod_next) * math.expm1(-h)
    if cumprod_last is None:
        return c_x, gain, 0.0, 0.0
    ratio = h / (half_log_snr(cumprod) - half_log_snr(cumprod_last))
    return c_x, gain * (1.0 + 0.5 * ratio), -0.5 * gain * ratio, 0.0
