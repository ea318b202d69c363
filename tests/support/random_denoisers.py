"""Networks in which every tensor is random: BatchNorm statistics, offsets, FiLM and output layers, too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from diffupose.config import PRESETS, DenoiserConfig
from diffupose.networks.build import build_denoiser

SKELETON_OF = {15: "humaneva_15", 16: "h36m_16", 17: "h36m_17"}


def denoiser_config(preset: str, **changes: Any) -> DenoiserConfig:
    """Return the network of a preset, smaller unless ``changes`` say otherwise."""
    values = vars(PRESETS[preset].denoiser) | {"hidden_dim": 48, "num_layers": 2} | changes
    return DenoiserConfig(**values)


def random_denoiser(config: DenoiserConfig) -> nn.Module:
    """Return a network whose layers keep the size of what passes through, in evaluation mode; answers are about 1."""
    net = build_denoiser(config)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            last = name.rpartition(".")[2]
            if last == "running_var":
                tensor.uniform_(0.5, 2.0)
            elif last in ("num_batches_tracked", "frequencies", "adjacency"):
                continue
            elif last in ("modulation", "adjacency_mask") or (last == "weight" and tensor.ndim == 1):
                tensor.normal_(1.0, 0.3)
            elif last == "weight":  # [C_out, C_in], or [2, C_in, C_out] of a graph convolution
                tensor.normal_(0.0, tensor.shape[1] ** -0.5)
                # Scores of some units: a softmax that is all or nothing turns rounding errors into any number.
                if name.startswith(("non_local.theta", "non_local.phi")):
                    tensor.mul_(0.5 * tensor.shape[0] ** -0.25)
            else:  # biases, means, embeddings, adjacency offsets
                tensor.normal_(0.0, 0.2)
        net.eval()
        size = net(*random_inputs(config, 20), torch.tensor([7])).square().mean().sqrt()
        last_layer = net.gconv_output if config.architecture == "modulated_gcn" else net.output
        for name in ("weight", "bias"):
            getattr(last_layer, name).div_(size)
    return net.requires_grad_(False)


def in_float64(net: nn.Module) -> nn.Module:
    """Return a copy that computes in float64, with the same numbers in it."""
    return copy.deepcopy(net).double()


def random_inputs(config: DenoiserConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x_t ``[N, J, 3]`` and conditions ``[N, J, C]``."""
    joints = int(config.skeleton[-2:])
    return torch.randn(count, joints, 3), torch.randn(count, joints, config.num_condition_channels)
