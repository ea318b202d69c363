"""The whole reverse process in one call: the public op over the reference, the C++ engine and the Triton step."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from diffupose.config import check_antithetic
from diffupose.engines import captured_loop
from diffupose.engines.cpp_engine import PackedDenoiser
from diffupose.engines.triton_network import FusedNetwork
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.philox_normal import philox_normal
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.reference.sample import sample as _reference
from diffupose.schedule import StepTable


def sample(
    denoiser: nn.Module | PackedDenoiser,
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
        denoiser: Network of ``(sample [N, J, 3], condition [N, J, C], timesteps [1]) -> [N, J, 3 or more]``, or its
            packed form, which the C++ or the CUDA engine runs.
        inputs: Conditions of shape ``[B, J, C]``.
        table: The sampler.
        seed: 64-bit seed.
        frame_ids: ``[B]`` int64, which noise each frame gets; default ``arange(B)``.
        hypothesis_ids: ``[H]`` int64; default ``arange(num_hypotheses)``.
        num_hypotheses: H, when ``hypothesis_ids`` is not given.
        clip_sample_range: Limit of x0 in the model's data units, or None.
        antithetic: Only False. Pairs of opposite noise are no longer drawn: they spoil the covariance.
        backend: A packed denoiser has its own, ``"cpp"`` or ``"cuda"``. A module, such as a ``FusedNetwork``, has
            ``"torch"``, whose noise comes
            from the fastest code there is unless it is named, and ``"triton"``, which has no gradient: on a GPU the
            steps are replayed as a CUDA graph from the second call of a shape on, so that the module's Python code runs
            no more.

    Returns:
        ``[B, H, J, 3]`` in the model's data units. Those of a packed denoiser are the same bits for any batch and
        order, on the CPU for any number of threads, and on a GPU within one mode of ``CudaDenoiser``.

    Raises:
        ValueError: If a shape does not fit, or the table needs what is not there.
        RuntimeError: If a CUDA graph is being captured and the packed denoiser has not been called with this table.
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
    if hypothesis_ids.ndim != 1:
        raise ValueError(f"hypothesis_ids must have shape [H], got {tuple(hypothesis_ids.shape)}")
    if frame_ids.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"frame_ids must have shape [{inputs.shape[0]}], got {tuple(frame_ids.shape)}")
    for name, ids in (("frame_ids", frame_ids), ("hypothesis_ids", hypothesis_ids)):
        if ids.device != inputs.device:
            raise ValueError(f"{name} must be on the device of inputs, {inputs.device}, got {ids.device}")
    if clip_sample_range is not None and not clip_sample_range >= 0:
        raise ValueError(f"clip_sample_range must not be negative, got {clip_sample_range}")
    own = (denoiser.backend,) if isinstance(denoiser, PackedDenoiser) else ("torch", "triton")
    unfit = {} if isinstance(denoiser, PackedDenoiser) else _unfit(denoiser, inputs)
    chosen = choose_backend(backend, inputs.device, own, unfit=unfit)
    scale = table.noise_scale_tensor()
    if scale is not None and scale.shape[1:] != (inputs.shape[1], 3):
        raise ValueError(f"table must have a noise scale of {inputs.shape[1]} joints, got {tuple(scale.shape)}")
    if isinstance(denoiser, PackedDenoiser):
        _check_packed(denoiser, inputs, table, seed, frame_ids, hypothesis_ids)
        return denoiser.sample(inputs, table, seed, frame_ids, hypothesis_ids, clip_sample_range)
    if isinstance(denoiser, FusedNetwork) and int(table.timesteps.max(initial=0)) >= denoiser.num_timesteps:
        raise ValueError(f"table must have timesteps below {denoiser.num_timesteps}, got {table.timesteps.max()}")
    noise = partial(philox_normal, backend=chosen if backend == chosen else None)
    if chosen == "triton":
        joints = inputs.shape[1]
        initial = noise(seed, frame_ids, hypothesis_ids, INITIAL_NOISE_STEP, 3 * joints).unflatten(-1, (joints, 3))
        _check_rows(table)
        return captured_loop.sample(
            denoiser, inputs, initial, table, seed, frame_ids, hypothesis_ids, clip_sample_range
        )
    return _reference(
        denoiser,
        inputs,
        table.tensor(),
        torch.from_numpy(table.timesteps).to(inputs.device),
        seed,
        frame_ids,
        hypothesis_ids,
        clip_sample_range,
        None if scale is None else scale.to(inputs.device),
        noise,
    )


def _unfit(denoiser: object, inputs: Tensor) -> dict[str, str]:
    """Return which backends cannot run these inputs, and why."""
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return {"triton": f"the Triton steps take float32, float16 and bfloat16, got {inputs.dtype}"}
    if not isinstance(denoiser, nn.Module):  # the reference runs any function; whether one has a gradient is unknown
        return {"triton": f"the Triton steps take a torch.nn.Module, got {type(denoiser).__name__}"}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs, *denoiser.parameters())):
        return {"triton": "the Triton steps have no gradient"}
    return {}


def _check_packed(
    denoiser: PackedDenoiser, inputs: Tensor, table: StepTable, seed: int, frame_ids: Tensor, hypothesis_ids: Tensor
) -> None:
    """Raise what the noise and the steps of the reference would raise, and check the shape that a module would."""
    joints, channels = denoiser.program.num_joints, denoiser.program.widths[0] - 3
    if inputs.shape[1:] != (joints, channels):
        raise ValueError(f"inputs must have shape [B, {joints}, {channels}], got {tuple(inputs.shape)}")
    philox_normal(seed, frame_ids[:0], hypothesis_ids[:0], 0, 3 * joints)
    _check_rows(table)


def _check_rows(table: StepTable) -> None:
    """Raise what the steps of the reference would raise."""
    terms = table.coefficients.astype(np.float32) != 0  # p, q, c_x, c_0, c_1, s
    if terms[:1, 4].any():
        raise ValueError("the first row of the step table needs x0_last, got None")
    if not (terms[:, :2].any(axis=1) & terms[:, 2:].any(axis=1)).all():
        raise ValueError("a row of the step table must have a term that is not 0")
