"""The networks that are timed, and how each engine runs them through the reverse process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads.flops import denoiser_flops
from benchmarks.workloads.measure import Call
from diffupose import Lifter, ops, reference
from diffupose.config import BASE, PAPER
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.engine import SampleRequest
from diffupose.engines.programs import layer_program
from diffupose.engines.triton_network import FusedNetwork
from diffupose.networks.build import build_denoiser
from diffupose.ops import PackedDenoiser, _backend
from diffupose.schedule import NoiseSchedule, StepTable, step_table

JOINTS = 17


@cache
def network(model: str, device: torch.device | None = None) -> Any:
    """Return a network in evaluation mode, on the CPU by default: ``mocap``, ``paper-WIDTH`` or ``base-WIDTH``."""
    if device is not None:
        return copy.deepcopy(network(model)).to(device)
    if model == "mocap":
        return Lifter.from_pretrained("mocap", device="cpu").denoiser
    torch.manual_seed(0)  # the time does not depend on the weights
    name, width = model.split("-")
    preset = {"paper": PAPER, "base": BASE}[name]
    net = build_denoiser(dataclasses.replace(preset.denoiser, hidden_dim=int(width))).eval()
    if name == "base":
        for parameter in net.parameters():  # those of some layers are zeros before training: nothing would get through
            parameter.data.add_(0.1 * torch.randn_like(parameter) * (not parameter.any()))
        return net
    # The output of an untrained network hardly depends on its input. It is scaled until it differs as poses do, or less
    # where most of it would be clipped: then a wrong result shows.
    sample, condition = torch.randn(64, JOINTS, 3), torch.randn(64, JOINTS, net.config.num_condition_channels)
    with torch.no_grad():
        net.gconv_output.bias.zero_()
        out = net(sample, condition, torch.tensor([50]))
        net.gconv_output.weight.mul_(min(0.08 / out.std(dim=0).mean(), 0.3 / out.abs().mean()))
    return net


def conditions(model: str, frames: int, device: torch.device) -> Tensor:
    """Return random conditions ``[B, J, C]``; those of a frame do not depend on B."""
    channels, most = network(model).config.num_condition_channels, max(frames, 1024)
    return torch.randn(most, JOINTS, channels, generator=torch.Generator().manual_seed(0))[:frames].to(device)


@cache
def packed_network(model: str, backend: str, precision: str, mode: str | None, device: torch.device) -> PackedDenoiser:
    """Return a network as an engine reads it; ``mode`` is one of the CUDA engine's, or None for its own choice."""
    program = layer_program(network(model))
    return CudaDenoiser(program, precision, device, mode) if backend == "cuda" else PackedDenoiser(program, precision)


@cache
def fused_network(model: str, precision: str, device: torch.device) -> FusedNetwork:
    """Return a network of PyTorch's products and Triton kernels."""
    return FusedNetwork(layer_program(network(model)), 1000, precision, device)


@dataclasses.dataclass(frozen=True)
class Chains:
    """The chains of the reverse process that are timed: ``hypotheses`` of each of ``frames``."""

    model: str
    frames: int
    hypotheses: int
    steps: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.model}, B={self.frames}, N={self.hypotheses}, {self.steps} steps"

    @property
    def count(self) -> int:
        """Return the number of chains."""
        return self.frames * self.hypotheses

    @property
    def flops(self) -> int:
        """Return the operations of all steps of all chains."""
        return denoiser_flops(network(self.model), JOINTS) * self.count * self.steps

    @property
    def clip(self) -> float | None:
        """Return the clip range of x0: `paper` is in metres, the others in units in which nothing is clipped."""
        return 1.0 if self.model.startswith("paper") else None

    @cached_property
    def table(self) -> StepTable:
        """Return the sampler: DDIM, which draws noise once.

        The network's output is taken for the clean sample, whatever it was trained for: the time is the same, and the
        errors of a chain do not grow.
        """
        total = 100 if self.model.startswith("paper") else 1000
        return step_table(NoiseSchedule(total), self.steps, sampler="ddim", prediction_type="sample")

    @cached_property
    def condition(self) -> Tensor:
        """Return the conditions ``[B, J, C]``."""
        return conditions(self.model, self.frames, self.device)

    @cached_property
    def ids(self) -> tuple[Tensor, Tensor]:
        """Return the ids of frames and hypotheses."""
        return torch.arange(self.frames, device=self.device), torch.arange(self.hypotheses, device=self.device)

    def by_engine(self, backend: str, precision: str, mode: str | None = None) -> Call:
        """Return a call of the C++ or the CUDA engine."""
        packed = packed_network(self.model, backend, precision, mode, self.device)
        return partial(packed.sample, SampleRequest(self.condition, self.table, 0, *self.ids, self.clip))

    def by_pytorch(self, net: nn.Module, autocast: bool) -> Call:
        """Return a call of the loop in plain PyTorch, with a network as it is, or compiled.

        Its only noise, that it starts from, is drawn before: counted noise is slow in PyTorch, and whoever writes such
        a loop takes ``torch.randn``.
        """
        noise = ops.philox_normal(0, *self.ids, ops.INITIAL_NOISE_STEP, 3 * JOINTS).unflatten(-1, (JOINTS, 3))
        coefficients, timesteps = self.table.tensor(), torch.from_numpy(self.table.timesteps).to(self.device)

        def run() -> Tensor:
            precision = torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)
            with torch.inference_mode(), precision, modules_by("torch"):
                return reference.sample(
                    net, self.condition, coefficients, timesteps, lambda step: noise, self.clip, None
                ).float()

        return run

    def by_triton(self, net: nn.Module) -> Call:
        """Return a call of the sampler by Triton, which captures a step: what runs on a machine without nvcc."""

        def run() -> Tensor:
            with torch.inference_mode(), modules_by("triton"):
                return ops.sample(
                    net, self.condition, self.table, num_hypotheses=self.hypotheses, clip_sample_range=self.clip,
                    backend="triton",
                )  # fmt: skip

        return run


@contextlib.contextmanager
def modules_by(backend: str) -> Iterator[None]:
    """Let modules take a backend: left to themselves they would run the fastest there is."""
    kept, _backend._FROM_ENVIRONMENT = _backend._FROM_ENVIRONMENT, backend
    try:
        yield
    finally:
        _backend._FROM_ENVIRONMENT = kept
