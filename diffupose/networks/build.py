"""Networks from their configuration, and lifters from their files.

All networks take the noisy pose ``x_t [N, J, 3]``, the condition ``[N, J, 2 or 3]`` (normalised 2D keypoints, and
presence) and timesteps ``[N]``. Their first three output channels are the prediction.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffupose.checkpoint import read_lifter_file
from diffupose.config import DenoiserConfig, LifterConfig
from diffupose.errors import InputError
from diffupose.networks.modulated_gcn import ModulatedGCN
from diffupose.networks.parallel_gcn import ParallelGCN


@dataclass(frozen=True)
class LifterFile:
    """A model, ready to be used.

    Attributes:
        config: The model.
        denoiser: The network with its weights, in evaluation mode, on the CPU.
        pose_mean, pose_scale: ``[J, 3]`` metres: a sample x0 stands for the pose ``pose_mean + pose_scale x0``.
        covariance_scale: ``[J]``: factors that calibrate ``LiftResult.covariance``.
        prediction_error: ``[T, J, 3]``: mean squared error of the predicted x0 at each timestep, per joint and axis, in
            data units, on people that the model was not fitted on, multiplied by
            ``calibrate --noise-factor``; None where nobody measured.
    """

    config: LifterConfig
    denoiser: nn.Module
    pose_mean: Tensor
    pose_scale: Tensor
    covariance_scale: Tensor
    prediction_error: Tensor | None = None


def build_denoiser(config: DenoiserConfig) -> nn.Module:
    """Return the network of a configuration, freshly initialised from torch's global generator."""
    return ModulatedGCN(config) if config.architecture == "modulated_gcn" else ParallelGCN(config)


def load_lifter_file(path: str | os.PathLike[str]) -> LifterFile:
    """Read a lifter: our safetensors, or a checkpoint of the released code (``best_model.pt``, ``model-k.pt``).

    Raises:
        InputError: If the file is damaged, or holds something else.
        FileNotFoundError: If there is none.
    """
    content = read_lifter_file(path)
    try:
        denoiser = build_denoiser(content.config.denoiser)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"{os.fspath(path)} describes a network that cannot be built: {error}") from None
    return LifterFile(content.config, _fill(denoiser, content.state, os.fspath(path)), **content.statistics)


def _fill(denoiser: nn.Module, state: dict[str, Tensor], path: str) -> nn.Module:
    """Return the network with its tensors, in evaluation mode."""
    expected = denoiser.state_dict()
    for name in sorted(set(expected) ^ set(state)):
        raise InputError(f"{path} {'lacks' if name in expected else 'has the unknown'} tensor {name!r}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise InputError(f"{name} in {path} must have shape {list(expected[name].shape)}, got {list(value.shape)}")
        try:
            finite = bool(torch.isfinite(value).all())
        except (TypeError, RuntimeError) as error:  # not every kind of tensor has numbers
            raise InputError(f"{name} in {path} is not a tensor of a network: {error}") from None
        if not finite:
            raise InputError(f"{name} in {path} holds values that are not finite")
    denoiser.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})
    return denoiser.eval().requires_grad_(False)
