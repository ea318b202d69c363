"""Networks from their configuration.

All networks take the noisy pose ``x_t [N, J, 3]``, the condition ``[N, J, 2 or 3]`` (normalised 2D keypoints, and
presence) and timesteps ``[N]``. Their first three output channels are the prediction.
"""

from __future__ import annotations

from torch import nn

from diffupose.config import DenoiserConfig
from diffupose.networks.modulated_gcn import ModulatedGCN
from diffupose.networks.parallel_gcn import ParallelGCN


def build_denoiser(config: DenoiserConfig) -> nn.Module:
    """Return the network of a configuration, freshly initialised from torch's global generator."""
    return ModulatedGCN(config) if config.architecture == "modulated_gcn" else ParallelGCN(config)
