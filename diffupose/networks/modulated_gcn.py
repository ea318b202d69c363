"""The released network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffupose.config import DenoiserConfig
from diffupose.networks.blocks import GraphConvBlock, ModulatedGraphConv, NonLocalBlock, TimeBlock, TimeEmbedding
from diffupose.skeleton import SKELETONS


class ModulatedGCN(nn.Module):
    """The released network: graph blocks, then time and non-local blocks.

    Five channels go in (noisy pose and 2D) and five come out: the prediction and the reconstructed 2D (eq. 9). With
    ``time_blocks="between"`` a time block follows each graph block instead, as the paper's text has it.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        if config.architecture != "modulated_gcn":
            raise ValueError(f"architecture must be modulated_gcn, got {config.architecture}")
        self.config = config
        width = config.hidden_dim
        adjacency = torch.tensor(SKELETONS[config.skeleton].adjacency(config.adjacency_normalization).tolist())
        channels = 3 + config.num_condition_channels
        self.gconv_input = GraphConvBlock(channels, width, adjacency, config)
        self.gconv_layers = nn.ModuleList(
            nn.Sequential(*(GraphConvBlock(width, width, adjacency, config) for _ in range(2)))
            for _ in range(config.num_layers)
        )
        self.gconv_output = ModulatedGraphConv(width, channels, adjacency, adjacency_mask=config.adjacency_mask)
        self.time_mlp = TimeEmbedding(width // 8, width // 2)
        count = config.num_layers if config.time_blocks == "between" else 2
        self.time_blocks = nn.ModuleList(TimeBlock(width, width // 2) for _ in range(count))
        self.non_local = NonLocalBlock(width)

    def forward(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Denoise.

        Args:
            sample: x_t of shape ``[N, J, 3]``.
            condition: ``[N, J, C]`` with C = ``num_condition_channels``.
            timesteps: Integers of shape ``[N]``.

        Returns:
            ``[N, J, 3 + C]``: the prediction, then the reconstructed condition.
        """
        embedding = self.time_mlp(timesteps)
        between = self.config.time_blocks == "between"
        x = self.gconv_input(torch.cat((sample, condition), dim=-1))  # [N, J, d]
        for index, block in enumerate(self.gconv_layers):
            x = x + block(x)
            if between:
                x = self.time_blocks[index](x, embedding)
        if between:
            x = self.non_local(x)
        else:
            x = self.time_blocks[1](self.non_local(self.time_blocks[0](x, embedding)), embedding)
        return self.gconv_output(x)
