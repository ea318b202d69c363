"""Graph convolutions beside attention in pre-norm residual blocks, with the timestep in every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffupose.config import DenoiserConfig
from diffupose.networks.blocks import ModulatedGraphConv, TimeEmbedding
from diffupose.skeleton import SKELETONS


class JointAttention(nn.Module):
    """Multi-head self-attention over the joints of a pose."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, J, C]`` to ``[N, J, C]``."""
        heads = self.qkv(x).to(self.qkv.weight.dtype).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [N, heads, J, C / heads] each
        # Written out and in float32: on so few joints the fused attention is slower, in bfloat16 many times.
        with torch.autocast(x.device.type, enabled=False):
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [N, heads, J, J]
            attended = torch.softmax(scores, dim=-1) @ value
        return self.out(attended.transpose(1, 2).flatten(2))


class ParallelBlock(nn.Module):
    """x + graph(FiLM(norm(x))) + attention(FiLM(norm(x))); with no heads no attention, without time no FiLM."""

    def __init__(self, adjacency: Tensor, config: DenoiserConfig, *, sees_time: bool = True) -> None:
        super().__init__()
        width = config.hidden_dim
        self.norm = nn.LayerNorm(width)
        self.film = nn.Linear(width, 2 * width) if sees_time else None
        self.gconv1 = ModulatedGraphConv(width, width, adjacency, adjacency_mask=config.adjacency_mask)
        self.gconv2 = ModulatedGraphConv(width, width, adjacency, adjacency_mask=config.adjacency_mask)
        self.dropout = nn.Dropout(config.dropout)
        self.attention = JointAttention(width, config.num_heads) if config.num_heads else None
        if self.film is not None:
            # Time starts without a say: a fresh FiLM is the identity.
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``[N, J, C]`` to ``[N, J, C]``, given the activated time embedding ``[N, C]``."""
        hidden = self.norm(x)
        if self.film is not None:
            scale, shift = self.film(embedding).unsqueeze(1).chunk(2, dim=-1)  # [N, 1, C] each
            hidden = hidden * (1 + scale) + shift
        graph = self.gconv2(functional.gelu(self.gconv1(hidden)))
        x = x + self.dropout(graph)
        return x if self.attention is None else x + self.attention(hidden)


class ParallelGCN(nn.Module):
    """Graph convolutions and joint attention side by side.

    The input is embedded per joint, plus a learned embedding of which joint it is; the output layer starts at zero.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        if config.architecture != "parallel_gcn":
            raise ValueError(f"architecture must be parallel_gcn, got {config.architecture}")
        self.config = config
        width = config.hidden_dim
        skeleton = SKELETONS[config.skeleton]
        adjacency = torch.tensor(skeleton.adjacency(config.adjacency_normalization).tolist())
        self.input = nn.Linear(3 + config.num_condition_channels, width)
        self.joint_embedding = nn.Parameter(0.02 * torch.randn(skeleton.num_joints, width))
        self.time_mlp = TimeEmbedding(width, width)
        self.blocks = nn.ModuleList(
            ParallelBlock(adjacency, config, sees_time=config.time_in_every_block or index + 1 == config.num_layers)
            for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 3)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Denoise ``sample [N, J, 3]`` given ``condition [N, J, C]`` and ``timesteps [N]``; returns ``[N, J, 3]``."""
        embedding = functional.silu(self.time_mlp(timesteps))
        # Coordinates go in and come out in full precision, whatever is between.
        with torch.autocast(sample.device.type, enabled=False):
            x = self.input(torch.cat((sample, condition), dim=-1)) + self.joint_embedding  # [N, J, d]
        for block in self.blocks:
            x = block(x, embedding)
        with torch.autocast(sample.device.type, enabled=False):
            return self.output(self.norm(x.to(self.output.weight.dtype)))
