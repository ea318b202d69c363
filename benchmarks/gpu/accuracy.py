"""Stage ``accuracy``: the bundled model on ``mocap_val.npz`` in bfloat16 against PyTorch in float32, same noise."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.accuracy.scores import score
from benchmarks.gpu.record import Record, Skip, arguments_of, run_stage
from benchmarks.workloads.case import backends
from diffupose import Lifter
from diffupose.datasets.mocap import load_mocap
from diffupose.errors import BackendUnavailableError
from diffupose.evaluation.cells import RIGS, choose_poses, make_cell
from diffupose.evaluation.mocap import POSES_PER_CELL

LIMIT = 0.2  # millimetres
HYPOTHESES = 10


def body(record: Record, arguments: Any) -> None:
    """Score both noisy cells in both precisions."""
    if arguments.validation is None:
        raise Skip("no --validation file")
    on_gpu = arguments.device.startswith("cuda")
    device = torch.device(arguments.device)
    lifter = Lifter.from_pretrained("mocap", device=arguments.device)
    mocap = load_mocap(arguments.validation)
    for rig in RIGS:
        cell = make_cell(choose_poses(mocap, POSES_PER_CELL if on_gpu else 30, 0), rig, True)

        def error(backend: str, precision: str, cell: Any = cell) -> float:
            result = cell.lift(lifter, num_hypotheses=HYPOTHESES, backend=backend, precision=precision)
            return score(lifter, cell, result)["mpjpe"]

        expected = error("torch", "float32")
        record.add(name=f"{cell.name} torch float32", mpjpe=expected)
        for backend in backends(device):
            for precision in ("float32", "bfloat16"):
                try:
                    found = error(backend, precision)
                except BackendUnavailableError as reason:
                    record.add(name=f"{cell.name} {backend} {precision}", not_run=str(reason))
                    continue
                record.add(
                    name=f"{cell.name} {backend} {precision}",
                    mpjpe=found,
                    difference=found - expected,
                    ok=abs(found - expected) <= LIMIT,
                )


if __name__ == "__main__":
    sys.exit(run_stage("accuracy", arguments_of(__doc__), body))
