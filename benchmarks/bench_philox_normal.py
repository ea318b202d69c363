"""Time of one step's noise: `make bench`, or `pytest benchmarks/bench_philox_normal.py --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from diffupose import ops, reference
from diffupose.testing import make_inputs, shape_id

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def torch_randn(seed, frame_ids, hypothesis_ids, step, num_elements):
    """The yardstick: PyTorch's own generator, whose numbers depend on what was drawn before."""
    return torch.randn(len(frame_ids), len(hypothesis_ids), num_elements, device=frame_ids.device)


def implementation(name):
    if name == "torch.randn":
        return torch_randn
    if name == "torch.compile":
        return torch.compile(reference.philox_normal)
    if not ops.available_backends()[name][0]:
        pytest.skip(ops.available_backends()[name][1])
    return lambda *inputs: ops.philox_normal(*inputs, backend=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["torch.randn", "torch", "torch.compile", "cpp"])
@pytest.mark.parametrize("shape", [(1, 10, 51), (1024, 10, 51)], ids=shape_id)
@pytest.mark.benchmark(group="philox_normal")
def bench_philox_normal(benchmark, timed, shape, name, device):
    if name == "cpp" and device != "cpu":
        pytest.skip("C++ runs on the CPU")
    inputs = make_inputs("philox_normal", shape, device=device)
    num_frames, num_hypotheses, num_elements = shape
    benchmark.extra_info.update(
        shape=shape, dtype="float32", device=device, bytes_moved=4 * num_frames * num_hypotheses * num_elements
    )
    rounds = 200 if num_frames == 1 else 20
    result = benchmark.pedantic(timed(implementation(name), *inputs), rounds=rounds, warmup_rounds=rounds // 4)
    assert result.shape == shape
