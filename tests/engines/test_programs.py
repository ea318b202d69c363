"""The layer programs of the networks: in float64 formulas they are the networks."""

from __future__ import annotations

import copy

import pytest
import torch
from support.plain_program import run_program
from support.random_denoisers import SKELETON_OF, denoiser_config, in_float64, random_denoiser, random_inputs
from torch import nn

from diffupose.config import BASE, PAPER
from diffupose.engines.layer_program import Attention, GraphConv, Linear, ScaleShift
from diffupose.engines.programs import has_program, layer_program
from diffupose.networks.build import build_denoiser

VARIANTS = {
    "paper": denoiser_config("paper"),
    "paper with everything": denoiser_config(
        "paper", time_blocks="between", adjacency_mask=True, condition_channels=3, adjacency_normalization="symmetric"
    ),
    "base": denoiser_config("base"),
    "base with everything": denoiser_config("base", adjacency_mask=True, camera_cue=True, num_heads=3),
    "base without attention": denoiser_config("base", num_heads=0),
    "base with time in the last block": denoiser_config("base", time_in_every_block=False),
    "base of one layer": denoiser_config("base", num_layers=1, hidden_dim=24),
}


@pytest.mark.parametrize("joints", [15, 16, 17])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_program_is_its_network(name, joints):
    """What is folded is folded in float64 and kept in float32: a few of its roundings are all that may differ."""
    config = denoiser_config("paper", **(vars(VARIANTS[name]) | {"skeleton": SKELETON_OF[joints]}))
    net = random_denoiser(config)
    inputs, timesteps = random_inputs(config, 4), torch.tensor([13])
    exact = in_float64(net)(inputs[0].double(), inputs[1].double(), timesteps)
    error = (run_program(layer_program(net), *inputs, timesteps) - exact).abs().max()
    assert error <= 2e-6 * exact.abs().max()


def tensors_of(net):
    return dict(net.named_parameters()) | dict(net.named_buffers())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_counts(name):
    """Otherwise a random network could not tell whether a tensor is in the program."""
    torch.manual_seed(0)  # in a few networks the rounding of weights alone moves what comes out by more
    config = VARIANTS[name]
    net = random_denoiser(config)
    inputs, timesteps = random_inputs(config, 2), torch.tensor([13])
    before = run_program(layer_program(net), *inputs, timesteps)
    for tensor_name in tensors_of(net):
        if tensor_name.endswith("num_batches_tracked"):
            continue
        changed = copy.deepcopy(net)
        with torch.no_grad():
            tensors_of(changed)[tensor_name].add_(0.3)
        after = run_program(layer_program(changed), *inputs, timesteps)
        exact = in_float64(changed)(inputs[0].double(), inputs[1].double(), timesteps)
        assert (after - exact).abs().max() <= 2e-6 * exact.abs().max(), tensor_name
        # A shift of all keys moves all scores of a query alike, which the softmax does not see.
        if tensor_name != "non_local.phi.bias":
            assert not torch.equal(after, before), tensor_name


def test_a_program_stays_as_it_was_when_the_network_changes():
    net = random_denoiser(VARIANTS["base"])
    program = layer_program(net)
    before = program.tabulate(torch.tensor([3]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    after = program.tabulate(torch.tensor([3]))
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("name", ["paper", "base"])
def test_tabulated_numbers_depend_on_their_timestep_alone(name):
    """The same bits for any company: a float32 product of many rows differs from that of one."""
    program = layer_program(random_denoiser(denoiser_config(name, hidden_dim=128)))
    timesteps = torch.arange(0, 1000, 37)
    together = program.tabulate(timesteps)
    assert all(value.dtype == torch.float32 for pair in together for value in pair)
    for row, timestep in enumerate(timesteps):
        alone = program.tabulate(timestep.view(1))
        for pair, single in zip(together, alone, strict=True):
            assert all(torch.equal(a[row], b[0]) for a, b in zip(pair, single, strict=True))


def test_layers_of_the_presets():
    paper, base = (layer_program(build_denoiser(preset.denoiser).eval()) for preset in (PAPER, BASE))
    kinds = [type(layer) for layer in paper.layers]
    assert kinds == [GraphConv] * 9 + [ScaleShift, Linear, Attention, Linear, ScaleShift, GraphConv]
    block = [ScaleShift, GraphConv, GraphConv, Linear, Attention, Linear]
    assert [type(layer) for layer in base.layers] == [Linear, *block * 4, ScaleShift, Linear]
    assert paper.widths == (5, 384, 384, 576, 192, 5)
    assert base.widths[0] == 3 + BASE.denoiser.num_condition_channels and base.widths[-1] == 3


def test_networks_without_a_program():
    net = random_denoiser(VARIANTS["paper"])
    assert has_program(net)
    others = {
        "training": copy.deepcopy(net).train(),
        "float64": copy.deepcopy(net).double(),
        "other": nn.Linear(3, 3).eval(),
        "hook": copy.deepcopy(net),
        "hook inside": copy.deepcopy(net),
    }
    others["hook"].register_forward_hook(lambda *_: None)
    others["hook inside"].gconv_input.register_forward_pre_hook(lambda *_: None)
    for name, other in others.items():
        assert not has_program(other), name
        with pytest.raises(ValueError, match="denoiser must be a network of this library in evaluation mode, got"):
            layer_program(other)
