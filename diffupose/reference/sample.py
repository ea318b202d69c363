"""The whole reverse process (Algorithm 2), for any sampler."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.reference.reverse_step import reverse_step

Noise = Callable[[int, Tensor, Tensor, int, int], Tensor]


def sample(
    denoiser: nn.Module,
    inputs: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seed: int,
    frame_ids: Tensor,
    hypothesis_ids: Tensor,
    clip_sample_range: float | None,
    noise_scale: Tensor | None,
    philox_normal: Noise,
) -> Tensor:
    """Return samples x0 ``[B, H, J, 3]``; see ``diffupose.ops.sample``."""
    batch, joints = inputs.shape[:2]
    hypotheses = len(hypothesis_ids)

    def noise(step: int) -> Tensor:
        drawn = philox_normal(seed, frame_ids, hypothesis_ids, step, 3 * joints)
        return drawn.unflatten(-1, (joints, 3)).to(inputs.dtype)  # [B, H, J, 3]

    rows = inputs.repeat_interleave(hypotheses, dim=0)  # [B H, J, C]
    x, x0 = noise(INITIAL_NOISE_STEP), None
    steps = coefficients.shape[0]
    for step in range(steps):
        # One timestep for all rows: its embedding is computed once and broadcast.
        output = denoiser(x.flatten(0, 1), rows, timesteps[step : step + 1])
        fresh = noise(step) if float(coefficients[step, 5]) != 0.0 else None
        output = output.unflatten(0, (batch, hypotheses))
        x, x0 = reverse_step(x, output, coefficients, step, x0, fresh, clip_sample_range, noise_scale)
    return x
