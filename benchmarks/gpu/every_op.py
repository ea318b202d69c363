"""Every op once, on every backend of a device: what sanitizers watch, and what graphs and streams repeat.

``python -m benchmarks.gpu.every_op [--device cuda] [--backend cuda]`` runs them and prints their names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.workloads import op_cases
from benchmarks.workloads.case import backends, tensors_of
from benchmarks.workloads.measure import Call
from benchmarks.workloads.networks import Chains
from benchmarks.workloads.sample_cases import ENGINES, has_clusters
from diffupose import ops
from diffupose.errors import BackendUnavailableError
from diffupose.testing import make_inputs


def calls(device: torch.device, backend: str) -> dict[str, Callable[[], Call]]:
    """Return what makes a call of each op, with inputs of its own; ``sample`` with both forms of the network."""
    found: dict[str, Callable[[], Call]] = {
        case.name: lambda make=make: make()[0]
        for case in op_cases.cases(device, "tiny", [backend])
        for variant, make in case.variants.items()
        if variant.startswith(backend)
    }
    found["reverse_step by a row on the host, scaled"] = partial(_scaled_step, device, backend)
    for model in ("paper-64", "mocap"):
        for name, (precision, mode) in ENGINES.get(backend, {}).items():
            if mode == "cluster" and not has_clusters(device):
                continue
            # The same kernel at half the width of ``mocap``: racecheck took more than two minutes over that.
            narrow = "base-64" if (model, mode) == ("mocap", "cluster") else model
            chains = Chains(narrow, 2, 8, 2, device)
            found[f"sample {narrow} {name}"] = partial(chains.by_engine, backend, precision, mode)
    return found


def _scaled_step(device: torch.device, backend: str) -> Call:
    sample, output, table, step, x0_last, _, scale = make_inputs("reverse_step", (2, 8, 17, 5), device=device)
    return partial(
        ops.reverse_step, sample, output, table.cpu(), step, x0_last=x0_last, noise_scale=scale,
        frame_ids=torch.arange(2, device=device), hypothesis_ids=torch.arange(8, device=device), backend=backend,
    )  # fmt: skip


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
                result = tensors_of(make()())
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
