"""The whole reverse process (Algorithm 2), for any sampler."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.reference.reverse_step import reverse_step


def sample(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    noise: Callable[[int], Tensor],
    clip_sample_range: float | None,
    noise_scale: Tensor | None,
) -> Tensor:
    """Return samples x0 ``[B, H, J, 3]``; see ``diffupose.ops.sample``.

    Args:
        denoiser: ``(sample [N, J, 3], condition [N, J, C], timesteps [1]) -> [N, J, 3 or more]``.
        condition: ``[B, J, C]``.
        coefficients: ``[S, 6]``, on the CPU.
        timesteps: ``[S]``, on the device of the condition.
        noise: Returns the noise ``[B, H, J, 3]`` of a step; that of ``INITIAL_NOISE_STEP`` starts the process.
        clip_sample_range: Limit of x0 in data units, or None.
        noise_scale: ``[S, J, 3]``, or None.
    """
    x, x0 = noise(INITIAL_NOISE_STEP).to(condition.dtype), None
    batch, hypotheses = x.shape[:2]
    rows = condition.repeat_interleave(hypotheses, dim=0)  # [B H, J, C]
    for step in range(coefficients.shape[0]):
        # One timestep for all rows: its embedding is computed once and broadcast.
        output = denoiser(x.flatten(0, 1), rows, timesteps[step : step + 1]).unflatten(0, (batch, hypotheses))
        fresh = noise(step).to(condition.dtype) if float(coefficients[step, 5]) != 0.0 else None
        x, x0 = reverse_step(x, output, coefficients, step, x0, fresh, clip_sample_range, noise_scale)
    return x
