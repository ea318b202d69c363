"""One step of the reverse process: the public op over the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.philox_normal import philox_normal
from diffupose.reference.reverse_step import reverse_step as _reference


def reverse_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    step: int,
    *,
    x0_last: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    seed: int = 0,
    frame_ids: Tensor | None = None,
    hypothesis_ids: Tensor | None = None,
    clip_sample_range: float | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sample of the next, less noisy, timestep and the predicted clean one.

        x0     = p x_t + q out                                 clipped to ±clip_sample_range if that is given
        x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s noise_scale z

    A term whose coefficient is 0 is skipped, so that a NaN in it does not matter.

    Args:
        sample: x_t of shape ``[B, H, J, 3]``, in the model's data units.
        model_output: ``[B, H, J, C]`` with C >= 3; channels after the third are ignored.
        coefficients: The table ``[S, 6]`` with columns p, q, c_x, c_0, c_1, s (``StepTable.tensor()``), on the CPU.
        step: Row of the table, in [0, S).
        x0_last: The previous step's x0, for multistep samplers (rows with c_1 != 0).
        noise: z of the same shape as ``sample``; None draws it by counter from ``seed``, ``frame_ids`` and
            ``hypothesis_ids``.
        noise_scale: ``[S, J, 3]``, what z is multiplied by besides s (``StepTable.noise_scale_tensor()``); None is 1.
        seed: 64-bit seed of drawn noise.
        frame_ids: ``[B]`` int64; default ``arange(B)``.
        hypothesis_ids: ``[H]`` int64; default ``arange(H)``.
        clip_sample_range: Limit of x0, in the model's data units.
        backend: ``"auto"`` or ``"torch"``; None takes the environment variable DIFFUPOSE_BACKEND, or else ``"auto"``.

    Returns:
        ``prev_sample`` and ``pred_original_sample``, both ``[B, H, J, 3]``.

    Raises:
        ValueError: If a shape or the step does not fit, or the row needs an ``x0_last`` that is not given.
        BackendUnavailableError: If the named backend cannot run here.

    Reference:
        DiffuPose eq. 3 and Algorithm 2; Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++).
    """
    if sample.ndim != 4 or sample.shape[-1] != 3:
        raise ValueError(f"sample must have shape [B, H, J, 3], got {tuple(sample.shape)}")
    if model_output.ndim != 4 or model_output.shape[:-1] != sample.shape[:-1] or model_output.shape[-1] < 3:
        expected = [*sample.shape[:-1], "3 or more"]
        raise ValueError(f"model_output must have shape {expected}, got {tuple(model_output.shape)}")
    if coefficients.ndim != 2 or coefficients.shape[1] != 6 or coefficients.device.type != "cpu":
        raise ValueError(
            f"coefficients must have shape [S, 6] on the CPU, got {tuple(coefficients.shape)} on {coefficients.device}"
        )
    if not 0 <= step < coefficients.shape[0]:
        raise ValueError(f"step must lie in [0, {coefficients.shape[0]}), got {step}")
    for name, tensor in (("x0_last", x0_last), ("noise", noise)):
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{name} must have the shape of sample, {tuple(sample.shape)}, got {tuple(tensor.shape)}")
    scale_shape = (coefficients.shape[0], *sample.shape[2:])
    if noise_scale is not None and noise_scale.shape != scale_shape:
        raise ValueError(f"noise_scale must have shape {list(scale_shape)}, got {tuple(noise_scale.shape)}")
    c_1, s = coefficients[step, 4:].tolist()
    if c_1 != 0.0 and x0_last is None:
        raise ValueError(f"x0_last is needed by row {step} of this table (c_1 = {c_1:g}), got None")
    choose_backend(backend, sample.device, ("torch",))
    if s != 0.0 and noise is None:
        batch, hypotheses, joints = sample.shape[:3]
        frames = torch.arange(batch, device=sample.device) if frame_ids is None else frame_ids
        ids = torch.arange(hypotheses, device=sample.device) if hypothesis_ids is None else hypothesis_ids
        noise = philox_normal(seed, frames, ids, step, 3 * joints).view(sample.shape).to(sample.dtype)
    return _reference(sample, model_output, coefficients, step, x0_last, noise, clip_sample_range, noise_scale)
