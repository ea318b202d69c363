"""Lifters with random weights, small enough for every test, and people to lift."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffupose import Lifter
from diffupose.checkpoint import save_lifter_file
from diffupose.config import PAPER, PARALLEL, LifterConfig, SamplingConfig
from diffupose.networks.build import build_denoiser

# A standing person, x to the right and y down, metres, in Human3.6M order.
STANDING = np.array(
    [
        [0.0, 0.0], [-0.13, 0.0], [-0.14, 0.45], [-0.15, 0.9], [0.13, 0.0], [0.14, 0.45], [0.15, 0.9], [0.0, -0.24],
        [0.0, -0.5], [0.01, -0.6], [0.0, -0.72], [0.17, -0.46], [0.3, -0.22], [0.36, 0.0], [-0.17, -0.46],
        [-0.32, -0.25], [-0.3, 0.02],
    ]
)  # fmt: skip


def people(count: int, *, center: tuple[float, float] = (500.0, 400.0), height: float = 300.0) -> np.ndarray:
    """Return ``count`` different people in pixels, ``[B, 17, 2]`` float64, inside 1000 x 800 by default."""
    generator = np.random.default_rng(7)
    joints = STANDING + generator.normal(scale=0.05, size=(count, 17, 2))
    return np.array(center) + height / 1.6 * joints


def tiny_config(kind: str = "person", skeleton: str = "h36m_17") -> LifterConfig:
    """``"person"``: our preset; ``"image"``: the released network's. Width 32, one layer, few steps."""
    if kind == "person":
        sampling = SamplingConfig(sampler="ddim", num_inference_steps=3, num_hypotheses=5, flip=False)
        diffusion = replace(PARALLEL.diffusion, num_train_timesteps=50)
        base = replace(PARALLEL, sampling=sampling, diffusion=diffusion)
    else:
        sampling = SamplingConfig(sampler="ddpm", num_inference_steps=4, num_hypotheses=5, flip=True)
        base = replace(PAPER, sampling=sampling, diffusion=replace(PAPER.diffusion, num_train_timesteps=20))
    return replace(base, denoiser=replace(base.denoiser, hidden_dim=32, num_layers=1, skeleton=skeleton))


def write_tiny_lifter(
    path: str | os.PathLike[str], kind: str = "person", skeleton: str = "h36m_17", *, seed: int = 0
) -> Path:
    """Write a lifter whose poses look like nothing but depend on everything: weights, condition and noise."""
    config = tiny_config(kind, skeleton)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = build_denoiser(config.denoiser)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
        joints = {"h36m_17": 17, "h36m_16": 16, "humaneva_15": 15}[skeleton]
        mean = 0.3 * torch.randn(joints, 3) if kind == "person" else torch.zeros(joints, 3)
    scale = torch.full((joints, 3), 0.1 if kind == "person" else 1.0)
    save_lifter_file(path, denoiser, config, mean, scale, torch.linspace(1.0, 2.0, joints))
    return Path(path)


def tiny_lifter(folder: Path, kind: str = "person", skeleton: str = "h36m_17") -> Lifter:
    """Return a lifter of ``write_tiny_lifter``, on the CPU."""
    return Lifter.from_pretrained(write_tiny_lifter(folder / f"{kind}.safetensors", kind, skeleton), device="cpu")
