"""Every op once, on every backend of a device: what sanitizers watch, and what graphs and streams repeat.

``python -m benchmarks.gpu.every_op [--device cuda] [--backend cuda]`` runs them and prints their names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.networks import sampler
from diffupose import ops
from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import _DEVICE_OF, TRITON_IS_INTERPRETED
from diffupose.testing import make_inputs

POSES, STEPS = 16, 2
# The engines of a backend: precision and mode.
FORMS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "cpp": (("float32", None), ("bfloat16", None)),
    "cuda": (("float32", "layers"), ("bfloat16", "layers"), ("bfloat16", "persistent"), ("bfloat16", "cluster")),
}
Call = Callable[[], Any]


def backends(device: torch.device) -> list[str]:
    """Return the backends of our own code that run on a device, the reference left out."""
    states = ops.available_backends()
    kinds = dict(_DEVICE_OF) | ({"triton": "cpu"} if TRITON_IS_INTERPRETED else {})
    return [name for name, where in kinds.items() if where == device.type and states[name][0]]


def has_clusters(device: torch.device) -> bool:
    """Return whether a device has clusters of blocks; emulated, the CPU has."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def calls(device: torch.device, backend: str) -> dict[str, Callable[[], Call]]:
    """Return what makes a call of each op, with inputs of its own; ``sample`` with both forms of the network."""
    found: dict[str, Callable[[], Call]] = {
        "modulated_graph_conv": partial(_graph_conv, device, backend, False),
        "modulated_graph_conv backward": partial(_graph_conv, device, backend, True),
        "philox_normal": partial(_philox_normal, device, backend),
        "reverse_step": partial(_reverse_step, device, backend, False),
        "reverse_step by a row on the device": partial(_reverse_step, device, backend, True),
        "hypothesis_statistics": partial(_hypothesis_statistics, device, backend),
    }
    sizes = {"frames": 2, "hypotheses": POSES // 2, "steps": STEPS}
    for model in ("paper-64", "mocap"):
        for precision, mode in FORMS.get(backend, ()):
            if mode == "cluster" and not has_clusters(device):
                continue
            # The same kernel at half the width of ``mocap``: racecheck took more than two minutes over that.
            narrow = "base-64" if (model, mode) == ("mocap", "cluster") else model
            name = f"sample {narrow} {precision}{f' {mode}' if mode else ''}"
            found[name] = partial(sampler, narrow, backend, precision, mode, device, **sizes)
    return found


def _graph_conv(device: torch.device, backend: str, backward: bool) -> Call:
    inputs = make_inputs("modulated_graph_conv", (POSES, 17, 24, 40), device=device, requires_grad=backward)
    return partial(_gradients if backward else ops.modulated_graph_conv, *inputs, backend=backend)


def _gradients(*inputs: Tensor, backend: str) -> tuple[Tensor, ...]:
    out = ops.modulated_graph_conv(*inputs, backend=backend)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))


def _philox_normal(device: torch.device, backend: str) -> Call:
    return partial(ops.philox_normal, *make_inputs("philox_normal", (3, 5, 51), device=device), backend=backend)


def _hypothesis_statistics(device: torch.device, backend: str) -> Call:
    hypotheses, keypoints, confidence, intrinsics = make_inputs("hypothesis_statistics", (3, 7, 17), device=device)
    return partial(
        ops.hypothesis_statistics, hypotheses, keypoints_2d=keypoints, confidence=confidence, intrinsics=intrinsics,
        backend=backend,
    )  # fmt: skip


def _reverse_step(device: torch.device, backend: str, on_device: bool) -> Call:
    sample, output, table, step, x0_last, _, scale = make_inputs("reverse_step", (2, 8, 17, 5), device=device)
    row = (table, torch.tensor([step], device=device)) if on_device else (table.cpu(), step)
    return partial(
        ops.reverse_step, sample, output, *row, x0_last=x0_last, noise_scale=scale,
        frame_ids=torch.arange(2, device=device), hypothesis_ids=torch.arange(8, device=device), backend=backend,
    )  # fmt: skip


def flatten(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [result] if isinstance(result, Tensor) else [value for value in result if value is not None]


def main() -> int:
    """Run every op once; a backend that lacks one is named, anything else is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--select", default="", metavar="REGEX", help="only those in whose names it is found")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    count = 0
    for backend in arguments.backend or backends(device):
        for name, make in calls(device, backend).items():
            if not re.search(arguments.select, name):
                continue
            try:
                result = flatten(make()())
            except BackendUnavailableError as error:
                print(f"{backend} {name}: not run: {error}")
                continue
            assert all(bool(torch.isfinite(value).all()) for value in result), f"{backend} {name} is not finite"
            print(f"{backend} {name}: ran", flush=True)
            count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls ran")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
