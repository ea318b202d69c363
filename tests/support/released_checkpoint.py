"""Checkpoints in the format of the released DiffuPose weights, filled with random values."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np
import torch
from support.reference_sampler import released_schedule

SCHEDULE_KEYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "p2_loss_weight",
)
_GRAPH_CONV = ("W", "M", "adj2", "bias")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_LINEAR = ("weight", "bias")

RELEASED_KEYS = (
    *SCHEDULE_KEYS,
    *(f"denoise_fn.gconv_input.0.gconv.{part}" for part in _GRAPH_CONV),
    *(f"denoise_fn.gconv_input.0.bn.{part}" for part in _BATCH_NORM),
    *(
        f"denoise_fn.gconv_layers.{layer}.gconv{half}.{part}"
        for layer in (0, 1, 2, 3)
        for half in (1, 2)
        for part in (*(f"gconv.{name}" for name in _GRAPH_CONV), *(f"bn.{name}" for name in _BATCH_NORM))
    ),
    *(f"denoise_fn.gconv_output.{part}" for part in _GRAPH_CONV),
    *(f"denoise_fn.non_local.g.{part}" for part in _LINEAR),
    *(f"denoise_fn.non_local.W.0.{part}" for part in _LINEAR),
    *(f"denoise_fn.non_local.W.1.{part}" for part in _BATCH_NORM),
    *(f"denoise_fn.non_local.{name}.{part}" for name in ("theta", "phi") for part in _LINEAR),
    *(f"denoise_fn.time_mlp.{index}.{part}" for index in (1, 3) for part in _LINEAR),
    *(f"denoise_fn.block{index}.mlp.1.{part}" for index in (1, 2, 3) for part in _LINEAR),
)
"""The 121 keys of the released diffusion, without prefix."""

EMA_KEYS = (
    "initted",
    "step",
    *(f"online_model.module.{key}" for key in RELEASED_KEYS),
    *(f"ema_model.module.{key}" for key in RELEASED_KEYS),
)
"""The 244 keys of ``checkpoint["ema"]``, as ema-pytorch 0.0.10 writes them."""


def random_state(d: int, J: int, seed: int, timesteps: int = 100) -> dict[str, np.ndarray]:
    """Return the 121 tensors of a released checkpoint, without prefix, in the order of ``RELEASED_KEYS``.

    The 13 schedule buffers are those of the cosine schedule. Every other tensor is random, on a scale that keeps the
    activations near 1 and the attention weights away from both uniform and one-hot.

    Args:
        d: Model width, a multiple of 16 and at least 32.
        J: Number of joints.
        seed: Seed of the random values.
        timesteps: Number of timesteps T.

    Returns:
        float32 arrays; ``num_batches_tracked`` is int64 and 0-d.

    Raises:
        ValueError: If ``d`` is not a multiple of 16 or is under 32.
    """
    if d % 16 or d < 32:
        raise ValueError(f"d must be a multiple of 16 and at least 32, got {d}")
    rng = np.random.default_rng(seed)
    state: dict[str, np.ndarray] = dict(released_schedule(timesteps))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, scale, shape)

    def graph_conv(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.W"] = normal(2, inputs, outputs, scale=inputs**-0.5)
        state[f"{name}.M"] = rng.uniform(0.5, 1.2, (J, outputs)) * rng.choice([-1.0, 1.0], (J, outputs))
        state[f"{name}.adj2"] = normal(J, J, scale=0.1)
        state[f"{name}.bias"] = normal(outputs, scale=0.2)

    def batch_norm(name: str) -> None:
        state[f"{name}.weight"] = rng.uniform(0.6, 1.4, d)
        state[f"{name}.bias"] = normal(d, scale=0.3)
        state[f"{name}.running_mean"] = normal(d, scale=0.3)
        state[f"{name}.running_var"] = rng.uniform(1.0, 3.0, d)
        state[f"{name}.num_batches_tracked"] = np.array(rng.integers(1, 100_000), dtype=np.int64)

    def linear(name: str, inputs: int, outputs: int, scale: float, bias_scale: float = 0.2) -> None:
        state[f"{name}.weight"] = normal(outputs, inputs, scale=scale * inputs**-0.5)
        state[f"{name}.bias"] = normal(outputs, scale=bias_scale)

    def conv1x1(name: str, inputs: int, outputs: int, scale: float = 1.0) -> None:
        linear(name, inputs, outputs, scale, bias_scale=0.2 * scale)
        state[f"{name}.weight"] = state[f"{name}.weight"].reshape(outputs, inputs, 1, 1)

    half = d // 2
    graph_conv("denoise_fn.gconv_input.0.gconv", 5, d)
    batch_norm("denoise_fn.gconv_input.0.bn")
    for layer in range(4):
        for index in (1, 2):
            graph_conv(f"denoise_fn.gconv_layers.{layer}.gconv{index}.gconv", d, d)
            batch_norm(f"denoise_fn.gconv_layers.{layer}.gconv{index}.bn")
    graph_conv("denoise_fn.gconv_output", d, 5)

    conv1x1("denoise_fn.non_local.g", d, half, scale=0.7)
    conv1x1("denoise_fn.non_local.W.0", half, d)
    batch_norm("denoise_fn.non_local.W.1")
    # The logits are not divided by the square root of their d/2 channels, so the weights make up for it.
    for name in ("theta", "phi"):
        conv1x1(f"denoise_fn.non_local.{name}", d, half, scale=0.9 * half**-0.25)

    linear("denoise_fn.time_mlp.1", d // 8, half, scale=1.5)
    linear("denoise_fn.time_mlp.3", half, half, scale=1.5)
    for index in (1, 2, 3):
        linear(f"denoise_fn.block{index}.mlp.1", half, 2 * d, scale=0.5)

    return {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in state.items()}


def write_released_checkpoint(
    path: str | os.PathLike[str], d: int, J: int, seed: int, timesteps: int = 100
) -> dict[str, np.ndarray]:
    """Write a checkpoint with random weights, laid out as the released one.

    ``model`` and ``ema["online_model"]`` hold the same values, as after an ordinary training step; those of
    ``ema["ema_model"]`` are different in every tensor but the schedule.

    Args:
        path: Where to write.
        d: Model width, see ``random_state``.
        J: Number of joints.
        seed: Seed of the random values.
        timesteps: Number of timesteps T.

    Returns:
        The state of ``ema_model`` without prefix: what a loader has to use.
    """
    averaged = random_state(d, J, seed, timesteps)
    online = random_state(d, J, seed + 1_000_003, timesteps)
    step = 12_345

    ema: OrderedDict[str, torch.Tensor] = OrderedDict()
    ema["initted"] = torch.tensor([1.0])
    ema["step"] = torch.tensor([step], dtype=torch.int64)
    for prefix, state in (("online_model.module.", online), ("ema_model.module.", averaged)):
        ema.update(_tensors(state, prefix))

    checkpoint = {
        "step": step,
        "model": _tensors(online, "module."),
        "ema": ema,
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 345,
        },
    }
    torch.save(checkpoint, path)
    return averaged


def _tensors(state: dict[str, np.ndarray], prefix: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((prefix + key, torch.from_numpy(value.copy())) for key, value in state.items())
