"""The whole reverse process, side by side: eager, `torch.compile`, the C++ engine in float32 and bfloat16.

``pytest benchmarks/bench_sample.py --benchmark-only`` ends with a table of ratios and of what was achieved over the
floor: the operations of ``denoiser_flops`` over the rate of a loop that touches registers only, measured in the same
run on every core. B = 32 is run with 10 steps: with 100 the eager loop alone takes minutes.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from diffupose import Lifter, ops
from diffupose.config import PAPER
from diffupose.engines.programs import denoiser_flops, layer_program
from diffupose.networks.build import build_denoiser
from diffupose.ops import PackedDenoiser, sample
from diffupose.schedule import NoiseSchedule, step_table

VARIANTS = ("eager", "compile", "cpp", "cpp-bf16")
SIZES = [(1, 1), (1, 10), (1, 50), (32, 1), (32, 10), (32, 50)]
CASES = [
    (model, frames, hypotheses, steps)
    for model in ("paper-384", "paper-256")
    for frames, hypotheses in SIZES
    for steps in ((100, 10) if frames == 1 else (10,))
]
CASES += [("mocap", *size, 5) for size in SIZES]


@cache
def network(model):
    if model == "mocap":
        return Lifter.from_pretrained("mocap", device="cpu").denoiser
    torch.manual_seed(0)  # the time does not depend on the weights
    config = PAPER.denoiser
    net = build_denoiser(type(config)(hidden_dim=int(model.removeprefix("paper-")))).eval()
    # Calmer than they are drawn: random weights make a chain of 100 steps explode, which no trained ones do.
    with torch.no_grad():
        net.gconv_output.weight.mul_(0.1)
    return net


@cache
def reference_result(model, frames, hypotheses, steps):
    net, table, inputs = case_inputs(model, frames, steps)
    with torch.inference_mode():
        return sample(net, inputs, table, num_hypotheses=hypotheses, clip_sample_range=1.0, backend="torch")


def case_inputs(model, frames, steps):
    net = network(model)
    prediction, total = ("sample", 1000) if model == "mocap" else ("epsilon", 100)
    table = step_table(NoiseSchedule(total), steps, sampler="ddim", prediction_type=prediction)
    channels = net.config.num_condition_channels
    inputs = torch.randn(frames, 17, channels, generator=torch.Generator().manual_seed(0))
    return net, table, inputs


def packed(net, precision):
    if not ops.available_backends()["cpp"][0]:
        pytest.skip(ops.available_backends()["cpp"][1])
    return PackedDenoiser(layer_program(net), precision)


@pytest.mark.parametrize(
    ("model", "frames", "hypotheses", "steps", "name"),
    [(*case, name) for case in CASES for name in VARIANTS],
    ids=lambda value: str(value),
)
def bench_sample(benchmark, timed, floor_rate, monkeypatch, model, frames, hypotheses, steps, name):
    benchmark.group = f"sample {model}, B={frames}, N={hypotheses}, {steps} steps"
    net, table, inputs = case_inputs(model, frames, steps)
    flops = denoiser_flops(net, 17) * frames * hypotheses * steps
    benchmark.extra_info.update(variant=name, flops=flops)
    if benchmark.disabled and (flops > 2e10 or name == "compile"):
        pytest.skip("nothing is timed: the small cases tell whether it runs")
    if name in ("eager", "compile"):
        # Plain PyTorch: left to themselves the modules would take the C++ graph convolution.
        monkeypatch.setattr("diffupose.ops._backend._FROM_ENVIRONMENT", "torch")
    if name == "compile":
        if flops > 5e11:
            pytest.skip("the eager and the fused code tell enough")
        torch._dynamo.reset()
        network_to_run = torch.compile(net, dynamic=False)
    elif name == "eager":
        network_to_run = net
    else:
        network_to_run = packed(net, "bfloat16" if name == "cpp-bf16" else "float32")
    call = timed(partial(sample, num_hypotheses=hypotheses, clip_sample_range=1.0), network_to_run, inputs, table)
    rounds = 1 if flops > 1e12 else 3 if flops > 2e11 else 7
    result = benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["floor_rate"] = floor_rate(name == "cpp-bf16")
    # A time counts only for the right result.
    difference = (result - reference_result(model, frames, hypotheses, steps)).abs()
    assert float(difference.mean() if name == "cpp-bf16" else difference.max()) < (0.05 if name == "cpp-bf16" else 1e-3)
