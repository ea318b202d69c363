"""Preset ``parallel``: its attention, its independence between poses, and what bfloat16 may touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffupose.config import PAPER, PARALLEL
from diffupose.networks.parallel_gcn import JointAttention, ParallelGCN


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = ParallelGCN(replace(PARALLEL.denoiser, hidden_dim=32, num_layers=2))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    sample, condition = (torch.randn(5, 17, 3, generator=generator) for _ in range(2))
    return sample, condition, torch.tensor([0, 1, 10, 100, 999])


def test_attention_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    attention = JointAttention(32, 4).double()
    expected = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    expected.load_state_dict({
        "in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias,
        "out_proj.weight": attention.out.weight, "out_proj.bias": attention.out.bias,
    })  # fmt: skip
    x = torch.randn(3, 17, 32, dtype=torch.float64)
    torch.testing.assert_close(attention(x), expected(x, x, x, need_weights=False)[0], rtol=0, atol=1e-12)


def test_a_fresh_network_predicts_the_mean_pose(inputs):
    assert torch.equal(ParallelGCN(PARALLEL.denoiser)(*inputs), torch.zeros(5, 17, 3))


@torch.no_grad()
def test_poses_do_not_talk_to_each_other(network, inputs):
    sample, condition, timesteps = inputs
    alone = network(sample[2:3], condition[2:3], timesteps[2:3])
    torch.testing.assert_close(network(*inputs)[2:3], alone, rtol=1e-5, atol=1e-5)
    assert float((network(sample, condition, timesteps.flip(0)) - network(*inputs)).abs().max()) > 1e-2


@torch.no_grad()
def test_the_last_block_alone_may_see_the_time(inputs):
    config = replace(PARALLEL.denoiser, hidden_dim=32, num_layers=3)
    networks = [ParallelGCN(replace(config, time_in_every_block=every)) for every in (True, False)]
    sees = []
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        seen: list[torch.Tensor] = []
        for block in network.blocks:
            block.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        sample, condition, timesteps = inputs
        network(sample, condition, timesteps)
        early, late = seen[:3], []
        seen.clear()
        network(sample, condition, timesteps.flip(0))
        late = seen[:3]
        sees.append([not torch.equal(one, other) for one, other in zip(early, late, strict=True)])
    assert sees == [[True, True, True], [False, False, True]]


def test_the_released_network_has_no_such_choice():
    with pytest.raises(ValueError, match="time_in_every_block must be true with architecture modulated_gcn"):
        replace(PAPER.denoiser, time_in_every_block=False)


@torch.no_grad()
def test_bfloat16_touches_only_what_is_between_the_coordinates(network, inputs):
    dtypes = {}
    for name in ("input", "blocks.0.attention.qkv", "output"):
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: dtypes.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*inputs)
    assert dtypes == {"input": torch.float32, "blocks.0.attention.qkv": torch.bfloat16, "output": torch.float32}
    exact = network(*inputs)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 3e-2
