"""Calls that launch every variant of the Triton kernels that is used, for ``compile_triton.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from diffupose.kernels.hypothesis_statistics import hypothesis_statistics
from diffupose.kernels.modulated_graph_conv import Epilogue, modulated_graph_conv_bwd, modulated_graph_conv_fwd
from diffupose.kernels.philox_normal import philox_normal
from diffupose.kernels.reverse_step import DrawnNoise, TableRow, reverse_step
from diffupose.testing import make_inputs

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
INDEX = torch.zeros(1, dtype=torch.int64)


def _step(
    dtype: torch.dtype, channels: int, *, noise: str, batch: int = 64, in_loop: bool = False, **options: Any
) -> Callable[[], Any]:
    """A step with all terms, or as the captured loop takes it; ``meta`` tensors may be as large as no memory is."""
    device = "meta" if batch > 1000 else "cpu"
    sample = torch.empty(batch, 10, 17, 3, dtype=dtype, device=device)
    output = torch.empty(batch, 10, 17, channels, dtype=dtype, device=device)
    ids = torch.empty(batch, dtype=torch.int64, device=device), torch.empty(10, dtype=torch.int64, device=device)
    if in_loop:
        options["out"] = sample, None
    table = torch.empty(5, 6, device=device)
    row = TableRow(table, INDEX.to(device), None if noise == "none" else torch.empty(5, 17, 3, device=device))
    z = {"given": sample, "drawn": DrawnNoise(INDEX.to(device), *ids), "none": None}[noise]
    return partial(reverse_step, sample, output, row, None if in_loop else sample, z, **options)


def _statistics(num_hypotheses: int, view: bool, joints: int = 17) -> Callable[[], Any]:
    inputs = make_inputs("hypothesis_statistics", (4, num_hypotheses, joints, view))
    return partial(hypothesis_statistics, *inputs, *([] if view else [None] * 3), 1.0, 0.01)


def _graph_conv(
    hidden: torch.dtype, out: torch.dtype, joints: int, channels: int = 384
) -> dict[str, Callable[[], Any]]:
    product, result = (torch.empty(40, joints, width, dtype=dtype)
                       for width, dtype in ((2 * channels, hidden), (channels, out)))  # fmt: skip
    modulation, adjacency = torch.empty(joints, channels), torch.empty(joints, joints)
    epilogue = Epilogue("gelu", result, torch.empty(5, 2 * channels), INDEX)
    calls = {
        "forward": partial(modulated_graph_conv_fwd, product, modulation, adjacency, modulation[0], result),
        "backward": partial(modulated_graph_conv_bwd, result, product, modulation, adjacency),
    }
    if hidden == out:
        calls["inference"] = partial(calls["forward"], own=modulation, epilogue=epilogue)
    return calls


CALLS: list[tuple[str, Callable[[], Any]]] = [
    ("philox_normal", partial(philox_normal, 0, INDEX, INDEX, 3, 51)),
    ("reverse_step large", _step(SINGLE, 5, noise="drawn", batch=1 << 24)),
    ("reverse_step in the loop", _step(SINGLE, 5, noise="drawn", in_loop=True)),
    ("reverse_step in the loop without noise", _step(SINGLE, 5, noise="none", in_loop=True)),
]
for _dtype in (SINGLE, HALF, BRAIN):
    for _noise, _channels, _clip in (("drawn", 3, 1.0), ("given", 5, None), ("none", 3, None)):
        _name = f"reverse_step {_noise} {_dtype}"
        CALLS.append((_name, _step(_dtype, _channels, noise=_noise, clip_sample_range=_clip)))
for _count in (10, 16, 200):
    CALLS.append((f"hypothesis_statistics {_count} moments", _statistics(_count, False)))
for _count in (1, 10, 99, 100, 200):
    CALLS.append((f"hypothesis_statistics {_count} view", _statistics(_count, True)))
for _count in (10, 50, 100):
    CALLS.append((f"hypothesis_statistics {_count} view of 16 joints", _statistics(_count, True, 16)))
for _hidden, _out in ((SINGLE, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (HALF, SINGLE), (BRAIN, SINGLE)):
    # Addresses of 5 channels, what the released network gives, are multiples of nothing.
    for _channels in (384, 5):
        for _name, _call in _graph_conv(_hidden, _out, 17, _channels).items():
            CALLS.append((f"modulated_graph_conv {_name} {_channels} {_hidden} {_out}", _call))
for _joints in (16, 64):
    for _name, _call in _graph_conv(SINGLE, SINGLE, _joints).items():
        CALLS.append((f"modulated_graph_conv {_name} {_joints} joints", _call))
