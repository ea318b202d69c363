"""What the networks are made of: modulated graph convolution, time embedding and time block, non-local block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffupose.config import DenoiserConfig
from diffupose.networks.batch_norm import JointBatchNorm
from diffupose.ops.modulated_graph_conv import modulated_graph_conv


class ModulatedGraphConv(nn.Module):
    """Graph convolution with modulated weights and adjacency (eq. 6-7).

    Args:
        in_channels: C_in.
        out_channels: C_out.
        adjacency: The skeleton's normalised adjacency A, ``[J, J]``.
        adjacency_mask: Learn the mask P of eq. 7; without it P is 1, as in the released network.
    """

    adjacency: Tensor

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor, *, adjacency_mask: bool = False) -> None:
        super().__init__()
        num_joints = adjacency.shape[0]
        self.register_buffer("adjacency", adjacency.clone(), persistent=False)
        self.weight = nn.Parameter(torch.empty(2, in_channels, out_channels))
        self.modulation = nn.Parameter(torch.empty(num_joints, out_channels))
        self.adjacency_offset = nn.Parameter(torch.full((num_joints, num_joints), 1e-6))
        self.adjacency_mask = nn.Parameter(torch.ones(num_joints, num_joints)) if adjacency_mask else None
        self.bias = nn.Parameter(torch.empty(out_channels))
        nn.init.xavier_uniform_(self.weight, gain=1.414)
        nn.init.xavier_uniform_(self.modulation, gain=1.414)
        nn.init.uniform_(self.bias, -1 / math.sqrt(out_channels), 1 / math.sqrt(out_channels))

    def modulated_adjacency(self) -> Tensor:
        """Return A * P + Q, symmetrised so that message passing stays undirected (Zou and Tang 2021)."""
        masked = self.adjacency if self.adjacency_mask is None else self.adjacency * self.adjacency_mask
        matrix = masked + self.adjacency_offset
        return 0.5 * (matrix + matrix.T)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, J, C_in]`` to ``[N, J, C_out]``, by the backend that ``ops.modulated_graph_conv`` chooses."""
        return modulated_graph_conv(x, self.weight, self.modulation, self.modulated_adjacency(), self.bias)


class GraphConvBlock(nn.Module):
    """Graph convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor, config: DenoiserConfig) -> None:
        super().__init__()
        self.gconv = ModulatedGraphConv(in_channels, out_channels, adjacency, adjacency_mask=config.adjacency_mask)
        self.bn = JointBatchNorm(out_channels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, J, C_in]`` to ``[N, J, C_out]``."""
        return self.dropout(functional.relu(self.bn(self.gconv(x))))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep and a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        half = embedding_dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / (half - 1)))
        self.register_buffer("frequencies", frequencies.to(torch.get_default_dtype()), persistent=False)
        self.linear1 = nn.Linear(embedding_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map integer timesteps ``[N]`` to features ``[N, hidden_dim]``."""
        angles = timesteps.unsqueeze(-1).to(self.frequencies.dtype) * self.frequencies  # [N, embedding_dim / 2]
        embedding = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.linear2(functional.gelu(self.linear1(embedding)))


class TimeBlock(nn.Module):
    """Scale and shift by the timestep, then SiLU; not residual (as in the released network)."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Modulate ``[N, J, C]`` by an embedding ``[N, E]``."""
        scale, shift = self.linear(functional.silu(embedding)).unsqueeze(1).chunk(2, dim=-1)  # [N, 1, C] each
        return functional.silu(x * (1 + scale) + shift)


class NonLocalBlock(nn.Module):
    """Embedded-Gaussian non-local block over joints (Wang et al. 2018), unscaled; the identity when fresh."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Linear(channels, channels // 2)
        self.phi = nn.Linear(channels, channels // 2)
        self.g = nn.Linear(channels, channels // 2)
        self.out = nn.Linear(channels // 2, channels)
        self.bn = JointBatchNorm(channels)
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, J, C]`` to ``[N, J, C]``."""
        attention = torch.softmax(self.theta(x) @ self.phi(x).transpose(-2, -1), dim=-1)  # [N, J, J]
        return x + self.bn(self.out(attention @ self.g(x)))
