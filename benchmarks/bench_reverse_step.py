"""Time of one reverse step: `make bench`, or `pytest benchmarks/bench_reverse_step.py --benchmark-only`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffupose import ops
from diffupose.testing import make_inputs, shape_id

SHAPES = [(1, 10, 17, 3), (1024, 10, 17, 5)]


def call_of(name, shape, drawn):
    """Return a call of one backend: a DDIM-like row, or one whose noise is drawn."""
    if not ops.available_backends()[name][0]:
        pytest.skip(ops.available_backends()[name][1])
    sample, output, coefficients, step, x0_last, _, scale = make_inputs("reverse_step", shape)
    if not drawn:
        coefficients[:, 4:] = 0.0
    return partial(
        ops.reverse_step, sample, output, coefficients, step, x0_last=x0_last, noise_scale=scale, backend=name
    )


@pytest.mark.parametrize("drawn", [False, True], ids=["deterministic", "drawn"])
@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="reverse_step")
def bench_reverse_step(benchmark, timed, shape, name, drawn):
    benchmark.extra_info.update(shape=shape, dtype="float32", drawn=drawn)
    rounds = 200 if shape[0] == 1 else 20
    result = benchmark.pedantic(timed(call_of(name, shape, drawn)), rounds=rounds, warmup_rounds=rounds // 4)
    assert result[0].shape == (*shape[:3], 3)


@pytest.mark.parametrize("drawn", [False, True], ids=["deterministic", "drawn"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.benchmark(group="reverse_step")
def bench_side_by_side(benchmark, compare, shape, drawn):
    calls = {name: torch.inference_mode()(call_of(name, shape, drawn)) for name in ("torch", "cpp")}
    title = f"reverse_step {shape_id(shape)} {'drawn' if drawn else 'deterministic'}"
    benchmark.extra_info["ratio"] = compare(title, calls, rounds=400 if shape[0] == 1 else 25)
    benchmark.pedantic(calls["cpp"], rounds=1)
