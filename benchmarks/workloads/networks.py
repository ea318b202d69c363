"""The networks that are timed, and the forms in which they are run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from diffupose import Lifter, ops, reference
from diffupose.config import BASE, PAPER
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.programs import denoiser_flops, layer_program
from diffupose.engines.triton_network import FusedNetwork
from diffupose.networks.build import build_denoiser
from diffupose.ops import PackedDenoiser, _backend
from diffupose.schedule import NoiseSchedule, StepTable, step_table

JOINTS = 17


@cache
def network(model: str) -> Any:
    """Return a network in evaluation mode, on the CPU: ``mocap``, ``paper-WIDTH`` or ``base-WIDTH``."""
    if model == "mocap":
        return Lifter.from_pretrained("mocap", device="cpu").denoiser
    torch.manual_seed(0)  # the time does not depend on the weights
    if model.startswith("base-"):
        return build_denoiser(replace(BASE.denoiser, hidden_dim=int(model.removeprefix("base-")))).eval()
    net = build_denoiser(type(PAPER.denoiser)(hidden_dim=int(model.removeprefix("paper-")))).eval()
    # An untrained network gives little more than its last bias. Here what comes of the input is about as large as poses
    # differ, or less where what is common to all would be as large as what is clipped: a wrong result shows.
    sample, condition = torch.randn(64, JOINTS, 3), torch.randn(64, JOINTS, net.config.num_condition_channels)
    with torch.no_grad():
        net.gconv_output.bias.zero_()
        out = net(sample, condition, torch.tensor([50]))
        net.gconv_output.weight.mul_(min(0.08 / out.std(dim=0).mean(), 0.3 / out.abs().mean()))
    return net


def clip_of(model: str) -> float | None:
    """Return where x0 is cut: `paper` is in metres, the bundled model in units in which nothing is cut."""
    return None if model == "mocap" else 1.0


def flops(model: str) -> int:
    """Return the operations of one call for one pose."""
    return denoiser_flops(network(model), JOINTS)


def steps_of(model: str, steps: int) -> StepTable:
    """Return the sampler that a network is timed with: DDIM, which draws noise once.

    The network's output is taken for the clean sample whatever it was trained for: the time is the same, and the errors
    of a chain do not grow.
    """
    total = 1000 if model == "mocap" else 100
    return step_table(NoiseSchedule(total), steps, sampler="ddim", prediction_type="sample")


def conditions(model: str, frames: int, device: torch.device) -> Tensor:
    """Return random conditions of some frames."""
    channels, most = network(model).config.num_condition_channels, max(frames, 1024)
    # A frame's numbers are the same however many there are.
    return torch.randn(most, JOINTS, channels, generator=torch.Generator().manual_seed(0))[:frames].to(device)


def sampler(
    model: str, backend: str, precision: str, mode: str | None, device: torch.device, *, frames: int, hypotheses: int,
    steps: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """Return a call of an engine; ``mode`` is one of the CUDA engine's, or None for what it chooses."""
    packed = packed_network(model, backend, precision, mode, device)
    inputs, table = conditions(model, frames, device), steps_of(model, steps)
    ids = torch.arange(frames, device=device), torch.arange(hypotheses, device=device)
    return partial(packed.sample, inputs, table, 0, *ids, clip_of(model), False)


@cache
def packed_network(model: str, backend: str, precision: str, mode: str | None, device: torch.device) -> PackedDenoiser:
    """Return a network as an engine reads it."""
    program = layer_program(network(model))
    return CudaDenoiser(program, precision, device, mode) if backend == "cuda" else PackedDenoiser(program, precision)


def loop(
    net: nn.Module,
    model: str,
    device: torch.device,
    *,
    frames: int,
    hypotheses: int,
    steps: int,
    autocast: bool,
) -> Callable[[], Tensor]:
    """Return a call of the sampling loop in plain PyTorch, with a network as it is, or compiled.

    The noise it starts from, the only one that these samplers draw, is there already: counted noise is slow in PyTorch,
    and who writes such a loop takes ``torch.randn``.
    """
    inputs, table = conditions(model, frames, device), steps_of(model, steps)
    ids = torch.arange(frames, device=device), torch.arange(hypotheses, device=device)
    noise = ops.philox_normal(0, *ids, ops.INITIAL_NOISE_STEP, 3 * JOINTS)
    coefficients, timesteps = table.tensor(), torch.from_numpy(table.timesteps).to(device)

    def run() -> Tensor:
        precision = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        with torch.inference_mode(), precision, modules_by("torch"):
            return reference.sample(
                net, inputs, coefficients, timesteps, 0, *ids, clip_of(model), None, lambda *_: noise
            ).float()

    return run


def triton_loop(
    net: nn.Module, model: str, device: torch.device, *, frames: int, hypotheses: int, steps: int
) -> Callable[[], Tensor]:
    """Return a call of the sampler by Triton, which captures a step: as a machine without nvcc has it."""
    inputs, table = conditions(model, frames, device), steps_of(model, steps)

    def run() -> Tensor:
        with torch.inference_mode(), modules_by("triton"):
            return ops.sample(
                net, inputs, table, num_hypotheses=hypotheses, clip_sample_range=clip_of(model), backend="triton"
            )

    return run


@cache
def fused_network(model: str, precision: str, device: torch.device) -> FusedNetwork:
    """Return a network of PyTorch's products and Triton kernels."""
    return FusedNetwork(layer_program(network(model)), 1000, precision, device)


@contextlib.contextmanager
def modules_by(backend: str) -> Iterator[None]:
    """Let modules take a backend: left to themselves they would run the fastest there is."""
    kept, _backend._FROM_ENVIRONMENT = _backend._FROM_ENVIRONMENT, backend
    try:
        yield
    finally:
        _backend._FROM_ENVIRONMENT = kept
