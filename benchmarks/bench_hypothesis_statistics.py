"""Time of mean, covariance and weighted mean: `pytest benchmarks/bench_hypothesis_statistics.py --benchmark-only`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffupose import ops
from diffupose.testing import make_inputs, shape_id

SHAPES = [(1, 10, 17), (1024, 50, 17)]


def call_of(name, shape, view):
    if not ops.available_backends()[name][0]:
        pytest.skip(ops.available_backends()[name][1])
    inputs = make_inputs("hypothesis_statistics", shape)
    options = dict(zip(("keypoints_2d", "confidence", "intrinsics"), inputs[1:], strict=True)) if view else {}
    return partial(ops.hypothesis_statistics, inputs[0], **options, backend=name)


@pytest.mark.parametrize("view", [False, True], ids=["moments", "reprojection"])
@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="hypothesis_statistics")
def bench_hypothesis_statistics(benchmark, timed, shape, name, view):
    benchmark.extra_info.update(shape=shape, dtype="float32", view=view)
    rounds = 200 if shape[0] == 1 else 10
    result = benchmark.pedantic(timed(call_of(name, shape, view)), rounds=rounds, warmup_rounds=rounds // 4)
    assert result.mean.shape == (shape[0], shape[2], 3)


@pytest.mark.parametrize("view", [False, True], ids=["moments", "reprojection"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="hypothesis_statistics")
def bench_side_by_side(benchmark, compare, shape, view):
    calls = {name: torch.inference_mode()(call_of(name, shape, view)) for name in ("torch", "cpp")}
    title = f"hypothesis_statistics {shape_id(shape)} {'with reprojection' if view else 'moments alone'}"
    benchmark.extra_info["ratio"] = compare(title, calls, rounds=200 if shape[0] == 1 else 15)
    benchmark.pedantic(calls["cpp"], rounds=1)
