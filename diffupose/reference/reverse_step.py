"""One step of the reverse process, for any sampler."""

from __future__ import annotations

from torch import Tensor


def reverse_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int,
    x0_last: Tensor | None = None,
    noise: Tensor | None = None,
    clip_sample_range: float | None = None,
    noise_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``x_prev`` and ``x0``, both ``[B, H, J, 3]``; see ``diffupose.ops.reverse_step``.

    A term whose coefficient is 0 is skipped, not multiplied: 0 * NaN would be NaN.
    """
    p, q, c_x, c_0, c_1, s = coefficients[step].tolist()
    x0 = _combine((p, sample), (q, model_output[..., :3]))
    if clip_sample_range is not None:
        x0 = x0.clamp(-clip_sample_range, clip_sample_range)
    if s != 0.0 and noise_scale is not None:
        noise = noise if noise is None else noise_scale[step].to(noise.dtype) * noise
    return _combine((c_x, sample), (c_0, x0), (c_1, x0_last), (s, noise)), x0


def _combine(*terms: tuple[float, Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for coefficient, tensor in terms:
        if coefficient == 0.0:
            continue
        if tensor is None:
            raise ValueError("this row of the step table needs x0_last or noise, got None")
        total = coefficient * tensor if total is None else total + coefficient * tensor
    if total is None:
        raise ValueError("a row of the step table must have a term that is not 0")
    return total
