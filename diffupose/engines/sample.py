"""The whole reverse process in one call: the public op over the engines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from diffupose.config import check_antithetic
from diffupose.engines.engine import Engine, SampleRequest
from diffupose.engines.module_engines import module_engine
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.philox_normal import philox_normal
from diffupose.schedule import StepTable


def sample(
    denoiser: nn.Module | Engine,
    inputs: Tensor,
    table: StepTable,
    *,
    seed: int = 0,
    frame_ids: Tensor | None = None,
    hypothesis_ids: Tensor | None = None,
    num_hypotheses: int | None = None,
    clip_sample_range: float | None = None,
    antithetic: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Return clean samples, drawn from noise step by step (Algorithm 2).

    Args:
        denoiser: Network of ``(sample [N, J, 3], condition [N, J, C], timesteps [1]) -> [N, J, 3 or more]``, or an
            engine, such as a ``PackedDenoiser``.
        inputs: Conditions of shape ``[B, J, C]``.
        table: The sampler.
        seed: 64-bit seed.
        frame_ids: ``[B]`` int64, which noise each frame gets; default ``arange(B)``.
        hypothesis_ids: ``[H]`` int64; default ``arange(num_hypotheses)``.
        num_hypotheses: H, when ``hypothesis_ids`` is not given.
        clip_sample_range: Limit of x0 in the model's data units, or None.
        antithetic: Only False. Pairs of opposite noise are no longer drawn: they spoil the covariance.
        backend: An engine has its own. A module has two. ``"torch"`` draws its noise by the fastest code there is,
            unless it is named. ``"triton"`` has no gradient; on a GPU, the second call of a shape captures a step as a
            CUDA graph, and from then on the module's Python code does not run.

    Returns:
        ``[B, H, J, 3]`` in the model's data units. Those of a ``PackedDenoiser`` are the same bits for any batch, order
        and number of threads; those of the CUDA engine are so within one of its modes.

    Raises:
        ValueError: If a shape does not fit, or the table needs what is not there.
        RuntimeError: If a CUDA graph is being captured and the CUDA engine has not been called with this table.
        BackendUnavailableError: If the named backend cannot run here.
    """
    check_antithetic(antithetic)
    if inputs.ndim != 3:
        raise ValueError(f"inputs must have shape [B, J, C], got {tuple(inputs.shape)}")
    if hypothesis_ids is None:
        if num_hypotheses is None or num_hypotheses < 1:
            raise ValueError(f"num_hypotheses must be at least 1 when hypothesis_ids is None, got {num_hypotheses}")
        hypothesis_ids = torch.arange(num_hypotheses, device=inputs.device)
    if frame_ids is None:
        frame_ids = torch.arange(inputs.shape[0], device=inputs.device)
    _check_ids(inputs, frame_ids, hypothesis_ids)
    if clip_sample_range is not None and not clip_sample_range >= 0:
        raise ValueError(f"clip_sample_range must not be negative, got {clip_sample_range}")
    if isinstance(denoiser, Engine):
        engine = denoiser
        choose_backend(backend, inputs.device, (engine.backend,))
    else:
        engine = module_engine(denoiser, inputs, backend)
    request = SampleRequest(inputs, table, seed, frame_ids, hypothesis_ids, clip_sample_range)
    engine.check(request)
    # No noise is drawn: this raises what the seed, the ids and their number may raise.
    philox_normal(seed, frame_ids[:0], hypothesis_ids[:0], 0, 3 * inputs.shape[1])
    _check_table(table, inputs.shape[1])
    return engine.sample(request)


def _check_ids(inputs: Tensor, frame_ids: Tensor, hypothesis_ids: Tensor) -> None:
    if hypothesis_ids.ndim != 1:
        raise ValueError(f"hypothesis_ids must have shape [H], got {tuple(hypothesis_ids.shape)}")
    if frame_ids.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"frame_ids must have shape [{inputs.shape[0]}], got {tuple(frame_ids.shape)}")
    for name, ids in (("frame_ids", frame_ids), ("hypothesis_ids", hypothesis_ids)):
        if ids.device != inputs.device:
            raise ValueError(f"{name} must be on the device of inputs, {inputs.device}, got {ids.device}")


def _check_table(table: StepTable, num_joints: int) -> None:
    """Raise what the steps of the reference would raise."""
    scale = table.noise_scale
    if scale is not None and scale.shape[1:] != (num_joints, 3):
        raise ValueError(f"table must have a noise scale of {num_joints} joints, got {tuple(scale.shape)}")
    terms = table.coefficients.astype(np.float32) != 0  # p, q, c_x, c_0, c_1, s
    if terms[:1, 4].any():
        raise ValueError("the first row of the step table needs x0_last, got None")
    if not (terms[:, :2].any(axis=1) & terms[:, 2:].any(axis=1)).all():
        raise ValueError("a row of the step table must have a term that is not 0")
