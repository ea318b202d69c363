"""Time of a graph convolution: `make bench`, or `pytest benchmarks/bench_modulated_graph_conv.py --benchmark-only`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffupose import ops, reference
from diffupose.testing import make_inputs, shape_id

SHAPES = [(128, 17, 128, 128), (1024, 17, 384, 384)]


def implementation(name):
    if name == "torch.compile":
        return torch.compile(reference.modulated_graph_conv)
    if not ops.available_backends()[name][0]:
        pytest.skip(ops.available_backends()[name][1])
    return partial(ops.modulated_graph_conv, backend=name)


@pytest.mark.parametrize("name", ["torch", "torch.compile", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="modulated_graph_conv")
def bench_forward(benchmark, timed, shape, name):
    inputs = make_inputs("modulated_graph_conv", shape)
    poses, joints, c_in, c_out = shape
    benchmark.extra_info.update(shape=shape, dtype="float32", flops=4 * poses * joints * c_in * c_out)
    rounds = 50 if poses < 1000 else 5
    result = benchmark.pedantic(timed(implementation(name), *inputs), rounds=rounds, warmup_rounds=rounds // 4)
    assert result.shape == (poses, joints, c_out)


def forward_and_backward(function, inputs, autocast):
    for tensor in inputs:
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*inputs)
    out.backward(torch.ones_like(out))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="modulated_graph_conv")
def bench_training(benchmark, compare, shape, compiled, autocast):
    """Forward and backward, as training runs them."""
    inputs = make_inputs("modulated_graph_conv", shape, requires_grad=True)
    functions = {name: implementation(name) for name in ("torch", "cpp")}
    if compiled:
        torch._dynamo.reset()  # each with its own share of the recompilation limit
        functions = {name: torch.compile(function, fullgraph=True) for name, function in functions.items()}
    calls = {name: partial(forward_and_backward, call, inputs, autocast) for name, call in functions.items()}
    mode = f"{'compile' if compiled else 'eager'} {'autocast' if autocast else 'fp32'}"
    title = f"modulated_graph_conv {shape_id(shape)} {mode} forward and backward"
    benchmark.extra_info["ratio"] = compare(title, calls, rounds=9 if shape[0] > 1000 else 49)
    benchmark.pedantic(calls["cpp"], rounds=1)
