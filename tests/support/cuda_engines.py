"""Networks and calls of the CUDA engine that several test files share."""

from __future__ import annotations

import pytest
import torch
from support.random_denoisers import denoiser_config

from diffupose import ops
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.ops import _backend
from diffupose.schedule import NoiseSchedule, step_table

STEP = torch.tensor([7])
# "persistent-mma" is the persistent kernel as GPUs other than Hopper's have it.
MODES = ["layers", "persistent", "persistent-mma", "cluster"]
RUNS = [("float32", "layers"), *(("bfloat16", mode) for mode in MODES)]
CONFIGS = {
    "paper": denoiser_config("paper", hidden_dim=32),
    "paper-mask": denoiser_config("paper", hidden_dim=64, condition_channels=3, adjacency_mask=True, num_layers=1),
    "paper-between": denoiser_config("paper", hidden_dim=32, time_blocks="between", num_layers=1),
    "base": denoiser_config("base", hidden_dim=64, num_heads=4, num_layers=1),
    "base-one-head": denoiser_config("base", hidden_dim=48, num_heads=1, camera_cue=True, num_layers=1),
    "base-no-attention": denoiser_config("base", hidden_dim=36, num_heads=0, num_layers=1),
}


def packed_of(program, gpu, precision="float32", mode=None):
    if mode == "cluster" and gpu.type == "cuda" and torch.cuda.get_device_capability(gpu) < (9, 0):
        pytest.skip("this GPU has no clusters")
    if mode != "persistent-mma":
        return CudaDenoiser(program, precision, gpu, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend.cuda(), "wgmma_available", lambda: False)
        return CudaDenoiser(program, precision, gpu, "persistent")


def few(mode, count):
    """So many, or one for clusters: emulated they take a while."""
    return 1 if mode == "cluster" else count


def table_of(sampler, steps=3, prediction_type="sample", **options):
    return step_table(NoiseSchedule(50), steps, sampler=sampler, prediction_type=prediction_type, **options)


def draw(packed, inputs, table, gpu, frame_ids=None, hypothesis_ids=None, **options):
    frame_ids = torch.arange(len(inputs)) if frame_ids is None else frame_ids
    hypothesis_ids = torch.arange(3) if hypothesis_ids is None else hypothesis_ids
    return ops.sample(
        packed, inputs.to(gpu), table, frame_ids=frame_ids.to(gpu), hypothesis_ids=hypothesis_ids.to(gpu),
        backend="cuda", **options,
    ).cpu()  # fmt: skip
