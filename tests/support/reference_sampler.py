"""Ancestral DDPM sampling in float64 NumPy, written from the standard formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def cosine_betas(timesteps: int, offset: float = 0.008) -> np.ndarray:
    """Return the betas ``[T]`` of the cosine schedule, float64, clipped to at most 0.999."""

    def level(step: int) -> float:
        return math.cos((step / timesteps + offset) / (1.0 + offset) * math.pi / 2.0) ** 2

    return np.array([min(1.0 - level(step + 1) / level(step), 0.999) for step in range(timesteps)])


def released_schedule(timesteps: int) -> dict[str, np.ndarray]:
    """Return the 13 schedule arrays ``[T]`` of the released checkpoint under their key names, float64.

    The variance is the posterior variance ("fixed small"); its logarithm is clipped at 1e-20. The loss weight has
    exponent 0, so it is all ones.
    """
    betas = cosine_betas(timesteps)
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    cumprod_prev = np.concatenate([[1.0], cumprod[:-1]])
    variance = betas * (1.0 - cumprod_prev) / (1.0 - cumprod)
    return {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(cumprod_prev) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - cumprod_prev) * np.sqrt(alphas) / (1.0 - cumprod),
        "p2_loss_weight": np.ones(timesteps),
    }


def ddpm_sample(
    forward: Forward,
    x_T: ArrayLike,
    cond: ArrayLike,
    noise: ArrayLike,
    T: int = 100,
    clip: float | None = 1.0,
) -> np.ndarray:
    """Sample with all T ancestral steps of an epsilon-predicting model.

    Args:
        forward: ``forward(x, cond, t)`` with ``x`` ``[B, J, 3]``, ``cond`` ``[B, J, 2]`` and ``t`` ``[B]`` int64;
            returns the noise estimate ``[B, J, 3]``.
        x_T: Initial noise ``[B, J, 3]``.
        cond: Normalised 2D keypoints ``[B, J, 2]``.
        noise: ``[T, B, J, 3]`` in the order of use: ``noise[0]`` goes with timestep T - 1. ``noise[T - 1]`` would go
            with timestep 0 and is never read, because the last step adds no noise.
        T: Number of timesteps.
        clip: Clamp the estimated pose to plus or minus this value; None does not clamp.

    Returns:
        Poses ``[B, J, 3]``, float64.

    Raises:
        ValueError: If ``noise`` or the result of ``forward`` has the wrong shape.
    """
    x = np.array(x_T, dtype=np.float64)
    cond = np.asarray(cond, dtype=np.float64)
    noise = np.asarray(noise, dtype=np.float64)
    if noise.shape != (T, *x.shape):
        raise ValueError(f"noise must have shape {(T, *x.shape)}, got {noise.shape}")

    betas = cosine_betas(T)
    alphas = 1.0 - betas
    for step in range(T):
        t = T - 1 - step
        level = math.prod(alphas[: t + 1])
        level_prev = math.prod(alphas[:t])

        eps = np.asarray(forward(x, cond, np.full(x.shape[0], t, dtype=np.int64)), dtype=np.float64)
        if eps.shape != x.shape:
            raise ValueError(f"forward must return shape {x.shape}, got {eps.shape}")
        x0 = (x - math.sqrt(1.0 - level) * eps) / math.sqrt(level)
        if clip is not None:
            x0 = np.clip(x0, -clip, clip)

        mean = (
            betas[t] * math.sqrt(level_prev) / (1.0 - level) * x0
            + (1.0 - level_prev) * math.sqrt(alphas[t]) / (1.0 - level) * x
        )
        if t == 0:
            return mean
        variance = betas[t] * (1.0 - level_prev) / (1.0 - level)
        x = mean + math.sqrt(variance) * noise[step]
    return x
