"""The network of a lift by Triton agrees with the formulas of its layer program and with the module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.plain_program import run_program
from support.random_denoisers import denoiser_config, random_denoiser, random_inputs
from support.random_layers import graph_conv, linear, program_of

from diffupose import Lifter, ops
from diffupose.engines import choose
from diffupose.engines.layer_program import Attention, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.engines.triton_network import FusedNetwork
from diffupose.schedule import NoiseSchedule, step_table

CONFIGS = {
    "paper": denoiser_config("paper", hidden_dim=32),
    "paper-mask": denoiser_config("paper", hidden_dim=32, condition_channels=3, adjacency_mask=True, num_layers=1),
    "paper-between": denoiser_config("paper", hidden_dim=32, time_blocks="between", num_layers=1),
    "base": denoiser_config("base", hidden_dim=32, num_heads=4, num_layers=2),
    "base-no-attention": denoiser_config("base", hidden_dim=20, num_heads=0, num_layers=1),
}
TIMESTEP = 7


def fused(program, device, precision="float32"):
    return FusedNetwork(program, 10, precision, device)


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_networks(name, count, device):
    config = CONFIGS[name]
    denoiser = random_denoiser(config)
    program, timestep = layer_program(denoiser), torch.tensor([TIMESTEP])
    sample, condition = random_inputs(config, count)[:2]
    out = fused(program, device)(*on(device, sample, condition, timestep)).cpu()
    exact = run_program(program, sample, condition, timestep)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, denoiser(sample, condition, timestep.expand(count)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["paper", "paper-between", "base"])
def test_networks_in_bfloat16(name, device):
    """The error is that of rounding each activation between the first and the last layer to eight bits."""
    config = CONFIGS[name]
    program, timestep = layer_program(random_denoiser(config)), torch.tensor([TIMESTEP])
    sample, condition = random_inputs(config, 9)[:2]
    network = fused(program, device, "bfloat16")
    out = network(*on(device, sample, condition, timestep)).cpu()
    exact = run_program(program, sample, condition, timestep)
    assert out.dtype == torch.float32
    error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 2e-2  # bfloat16 was used, and the result is right


def test_every_layer_with_every_option(device):
    """Random tensors everywhere: residuals, own weights, both kinds of bias, scale and shift fused or as a layer."""
    joints, width = 5, 24
    plain = linear(4, 5, joints, width, 3)
    layers = (
        graph_conv(0, 1, joints, 5, width, activation="gelu"),
        graph_conv(1, 2, joints, width, width, activation="relu"),
        graph_conv(2, 1, joints, width, width, activation="none", residual=1),
        ScaleShift(1, 1, 0, width, normalize=False),
        ScaleShift(1, 2, 1, width, normalize=True, eps=1e-5),
        linear(2, 3, joints, width, 3 * width),
        Attention(3, 4, 3, width // 3),
        linear(4, 1, joints, width, width, residual=1),
        ScaleShift(1, 4, 2, width, normalize=False),
        replace(plain, bias=plain.bias[0]),
    )
    tables = [(torch.randn(10, width), torch.randn(10, width)) for _ in range(3)]
    program = program_of(*layers, joints=joints, widths=(5, width, width, 3 * width, width, 3))
    program = replace(program, tabulate=lambda t: [(scale[t], shift[t]) for scale, shift in tables])
    network = fused(program, device)
    assert len(network.steps) == len(layers) - 1  # one scale and shift is fused into the kernel before it
    sample, condition, timestep = torch.randn(4, joints, 3), torch.randn(4, joints, 2), torch.tensor([TIMESTEP])
    out = network(*on(device, sample, condition, timestep)).cpu()
    exact = run_program(program, sample, condition, timestep)
    torch.testing.assert_close(out.double(), exact, rtol=2e-5, atol=2e-5)


def test_weights_are_copies_and_inputs_stay(device):
    """Weights are copies: later changes of the network have no effect. Inputs are not written to."""
    config = CONFIGS["paper"]
    denoiser = random_denoiser(config)
    network = fused(layer_program(denoiser), device)
    inputs = on(device, *random_inputs(config, 3)[:2], torch.tensor([TIMESTEP]))
    before, copies = network(*inputs), [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(network(*inputs), before)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_errors(device):
    config = CONFIGS["paper"]
    program = layer_program(random_denoiser(config))
    network = fused(program, device)
    inputs = on(device, *random_inputs(config, 3)[:2])
    with pytest.raises(ValueError, match=r"timesteps must have shape \[1\], got \(3,\)"):
        network(*inputs, torch.tensor([1, 2, 3], device=device))
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'float16'"):
        fused(program, device, "float16")
    table = step_table(NoiseSchedule(100), 2, sampler="ddim", prediction_type="sample")
    with pytest.raises(ValueError, match="table must have timesteps below 10, got 99"):
        ops.sample(network, inputs[1], table, num_hypotheses=2, backend="triton")


def test_lifter_in_both_precisions(device, monkeypatch):
    """It packs the network once for each precision, until the weights change."""
    packed = []
    monkeypatch.setattr(choose, "FusedNetwork", lambda *args: packed.append(args[2]) or FusedNetwork(*args))
    lifter = Lifter.from_pretrained(device=device.type)
    keypoints = 400.0 + 100.0 * torch.randn(1, 17, 2)
    settings = {"image_size": (1280, 720), "num_hypotheses": 2, "num_inference_steps": 1, "backend": "triton"}
    exact, rounded = lifter(keypoints, **settings), lifter(keypoints, precision="bfloat16", **settings)
    assert (exact.meta["precision"], rounded.meta["precision"]) == ("float32", "bfloat16")
    distance = (exact.hypotheses - rounded.hypotheses).norm(dim=-1)
    assert 0.0 < distance.mean() < 5e-3
    assert torch.equal(lifter(keypoints, **settings).hypotheses, exact.hypotheses)
    assert packed == ["float32", "bfloat16"]
    with torch.no_grad():
        lifter.denoiser.output.bias.add_(0.5)
    moved = lifter(keypoints, **settings).hypotheses - exact.hypotheses
    assert moved.abs().max() > 1e-2
    assert packed[2:] == ["float32"]
