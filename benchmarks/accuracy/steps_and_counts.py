"""Error against steps and against the number of hypotheses, for one model, on the selection subjects.

python -m benchmarks.accuracy.steps_and_counts --data mocap_train.npz [--model mocap]

Writes ``benchmarks/results/sampling.json``: noisy cells of both rigs, tier ``raw``; ``mocap_val.npz`` is never looked
at. ``fixed_small`` rows are the plain solvers, ``analytic`` rows add the calibrated noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.scores import RESULTS, score, write
from diffupose import Lifter
from diffupose.datasets.mocap import SELECTION_SUBJECTS, load_mocap
from diffupose.evaluation.fit_uncertainty import calibration_cells
from diffupose.evaluation.mocap import score_poses, undistorted
from diffupose.lifting.aggregation import mean_by_reprojection

STEPS, COUNTS = (1, 2, 3, 5, 7, 10, 25, 100), (1, 2, 5, 10, 20, 50)
NUM_HYPOTHESES = 10
# 0 stands for an infinite temperature: all hypotheses count alike.
WEIGHTS, TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 1.0), (0.005, 0.01, 0.02, 0.05, 0.0)

# Solver, and where it is evaluated.
SOLVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {"sampler": "ddim", "variance": "fixed_small"}),
    ("dpm++", {"sampler": "dpm++"}),
    ("ddim analytic", {"sampler": "ddim", "variance": "analytic"}),
    ("ddim analytic quadratic", {"sampler": "ddim", "variance": "analytic", "timestep_spacing": "quadratic"}),
)


def main() -> None:
    """Sample, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="NPZ", help="mocap_train.npz")
    parser.add_argument("--model", default="mocap", metavar="NAME|PATH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-poses", type=int, default=150, help="a rig (default: %(default)s)")
    options = parser.parse_args()
    lifter = Lifter.from_pretrained(options.model, device=options.device)
    cells = calibration_cells(load_mocap(options.data, include=SELECTION_SUBJECTS), options.num_poses)

    def scores(count: int, **settings: Any) -> dict[str, Any]:
        return {cell.name: score(lifter, cell, cell.lift(lifter, num_hypotheses=count, **settings)) for cell in cells}

    runs: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
        ({"curve": name, "num_inference_steps": steps}, NUM_HYPOTHESES, {**settings, "num_inference_steps": steps})
        for name, settings in SOLVERS
        for steps in STEPS
    ]
    default = lifter.sampling().num_inference_steps
    runs += [({"curve": "independent", "num_inference_steps": default}, count, {}) for count in COUNTS]
    rows = [
        {**label, "num_hypotheses": count, "cells": scores(count, **settings)}
        for label, count, settings in tqdm(runs, disable=None)
    ]
    # One pose out of ten, and with intrinsics the settings of ``mean_by_reprojection``.
    aggregation: dict[str, Any] = {}
    camera: list[dict[str, Any]] = []
    for cell in cells:
        result = cell.lift(lifter, num_hypotheses=NUM_HYPOTHESES)
        for method in ("mean", "medoid", "density"):
            aggregation.setdefault(method, {})[cell.name] = score_poses(result.best(method).cpu(), cell)
        keypoints, intrinsics = undistorted(cell)
        result = cell.lift(lifter, keypoints, intrinsics=intrinsics, num_hypotheses=NUM_HYPOTHESES)
        for weight in WEIGHTS:
            for temperature in TEMPERATURES:
                poses_3d = mean_by_reprojection(
                    result.hypotheses.cpu(), result.keypoints_2d.cpu(), result.confidence.cpu(), intrinsics,
                    weight=weight, temperature=temperature or float("inf"),
                )  # fmt: skip
                camera.append({"weight": weight, "temperature": temperature, "cell": cell.name,
                               "mpjpe": score_poses(poses_3d, cell)["mpjpe"]})  # fmt: skip
    content = {
        "command": f"python -m benchmarks.accuracy.steps_and_counts --data {Path(options.data).name} "
        f"--model {Path(options.model).name}",
        "subjects": list(SELECTION_SUBJECTS),
        "num_poses": len(cells[0].source),
        "rows": rows,
        "aggregation": aggregation,
        "camera": camera,
    }
    write(RESULTS / "sampling.json", content)


if __name__ == "__main__":
    main()
