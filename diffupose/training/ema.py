"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from diffupose.training.config import TrainConfig


class ExponentialMovingAverage:
    """A copy of the network whose weights and BatchNorm statistics follow the trained ones.

    The decay grows as 1 - (1 + n)^-power up to its limit, so that early weights are forgotten quickly.
    """

    def __init__(self, denoiser: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, denoiser: nn.Module, step: int) -> None:
        """Follow the weights after ``step`` optimiser steps."""
        config = self.config
        if step % config.ema_every:
            return
        age = step - config.ema_start
        decay = 0.0 if age <= 0 else min(config.ema_decay, 1.0 - (1.0 + age) ** -config.ema_power)
        averages = self.model.state_dict()
        floats, targets = [], []
        for name, value in denoiser.state_dict().items():
            if value.is_floating_point():
                floats.append(averages[name])
                targets.append(value)
            else:
                averages[name].copy_(value)
        torch._foreach_lerp_(floats, targets, 1.0 - decay)
