"""The figures of the model card and of ``docs/ablation.md`` that come from ``mocap_val.npz``, each with its command.

python -m benchmarks.accuracy.model_card --data mocap_val.npz --reference mocap_train.npz [--runs FOLDER]
    [--only NAME ...]

Every item is a JSON file in ``benchmarks/results/validation/``; one that exists is not made again. Items of the
bundled model need nothing else; those that compare recipes at equal samples need the lifters that the commands in
``RUNS`` train, in ``FOLDER/NAME/model.safetensors``.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import diffupose
from benchmarks.accuracy.scores import RESULTS, score, write
from diffupose import Lifter
from diffupose.camera import person_box
from diffupose.datasets.mocap import SELECTION_SUBJECTS, Mocap, load_mocap
from diffupose.evaluation.cells import RIGS, choose_poses, make_cell
from diffupose.evaluation.fit_uncertainty import calibration_cells, measure_prediction_error
from diffupose.evaluation.mocap import POSES_PER_CELL, evaluate_mocap, undistorted
from diffupose.lifting.aggregation import reprojection_error

# Of `base` at equal samples: x, y, z. The bundled model takes more steps and less noise in each.
NUM_STEPS, NOISE_FACTOR = 5, (20.0, 5.5, 5.3)

_PAPER = "--preset paper --hidden-dim 192 --lr 1e-3"
# The width of `paper` gives it no fewer parameters than `base` has.
RECIPES = {
    "base": "--preset base",
    "regressor": "--preset base --model diffusion.deterministic=true",
    "paper": f"{_PAPER} --no-vary-bodies --no-vary-cameras --noise-scale 0",
    "paper-person": f"{_PAPER} --input-normalization person",
}
# 5.12 million samples each, a quarter and an eighth of them.
STEPS = dict.fromkeys(RECIPES, 40000) | {
    f"{name}-{part}": steps
    for part, steps in (("quarter", 10000), ("eighth", 5000))
    for name in ("base", "paper", "paper-person")
}


def recipe_of(name: str) -> str:
    """Return the key of ``RECIPES`` that a run is named after."""
    return name.removesuffix("-quarter").removesuffix("-eighth")


RUNS = {
    name: f"diffupose train {RECIPES[recipe_of(name)]} --data mocap_train.npz --steps {steps} "
    "--batch-size 128 --seed 0 --precision bfloat16 --compile"
    for name, steps in STEPS.items()
}


def noisy_cells(lifter: Lifter, mocap: Mocap, counts: tuple[int, ...], **settings: Any) -> dict[str, Any]:
    """Return the scores of both noisy cells for several N."""
    cells: dict[str, Any] = {}
    for rig in RIGS:
        cell = make_cell(choose_poses(mocap, POSES_PER_CELL, 0), rig, True)
        result = cell.lift(lifter, num_hypotheses=max(counts), **settings)
        cells[cell.name] = {f"N={count}": score(lifter, cell, result, count) for count in counts}
        cells["settings"] = result.meta
    return cells


def depth_and_reprojection(lifter: Lifter, mocap: Mocap, num_poses: int = 400) -> dict[str, Any]:
    """Return the wrists' standard deviation in depth, and how far hypotheses project from clean keypoints."""
    poses, rows = choose_poses(mocap, num_poses, 0), {}
    for rig in RIGS:
        for noisy in (False, True):
            cell = make_cell(poses, rig, noisy)
            result = cell.lift(lifter, num_hypotheses=10)
            depth = result.hypotheses[:, :, [13, 16], 2].std(dim=1).mean()
            rows[cell.name] = {"wrist_depth_deviation_mm": 1000 * float(depth)}
        cell = make_cell(poses, rig, False)
        keypoints, intrinsics = undistorted(cell)
        result = cell.lift(lifter, keypoints, intrinsics=intrinsics, num_hypotheses=10)
        present = result.confidence > 0
        error, _ = reprojection_error(
            result.hypotheses.cpu(), result.keypoints_2d.cpu(), result.confidence.cpu(), intrinsics
        )
        _, half = person_box(result.keypoints_2d.cpu(), present.cpu())
        rows[f"{rig} clean"]["reprojection_error_of_box_side"] = float((error / (2 * half)).mean())
    return {"num_poses": num_poses, "num_hypotheses": 10, "cells": rows}


def of_a_run(name: str, options: argparse.Namespace, mocap: Mocap) -> dict[str, Any]:
    """Score a lifter of ``RUNS``; ``base`` with analytic noise in few steps."""
    lifter = Lifter.from_pretrained(Path(options.runs) / name / "model.safetensors", device=options.device)
    recipe = recipe_of(name)
    if recipe == "base":
        sampling = replace(lifter.config.sampling, variance="analytic", num_inference_steps=NUM_STEPS)
        lifter.config = replace(lifter.config, sampling=sampling)
        cells = calibration_cells(load_mocap(options.reference, include=SELECTION_SUBJECTS), 400)
        lifter.prediction_error = torch.tensor(NOISE_FACTOR) * measure_prediction_error(lifter, cells).cpu()
    counts = {"base": (10, 50), "regressor": (1,)}.get(recipe, (10,))
    parameters = sum(value.numel() for value in lifter.denoiser.parameters())
    return {"trained_by": RUNS[name], "parameters": parameters, **noisy_cells(lifter, mocap, counts)}


def main() -> None:
    """Score what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="NPZ", help="mocap_val.npz")
    parser.add_argument("--reference", required=True, metavar="NPZ", help="mocap_train.npz")
    parser.add_argument("--runs", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", metavar="HASH", help="of the sources, where they are no git repository")
    options = parser.parse_args()
    mocap = load_mocap(options.data)
    bundled = partial(Lifter.from_pretrained, "mocap", device=options.device)
    items: dict[str, Callable[[], dict[str, Any]]] = {
        "raw": lambda: evaluate_mocap(bundled(), mocap, load_mocap(options.reference), num_hypotheses=(1, 10, 50)),
        "camera": lambda: evaluate_mocap(bundled(), mocap, None, tier="camera", num_hypotheses=(10,)),
        "bfloat16": lambda: noisy_cells(bundled(), mocap, (10,), precision="bfloat16"),
        "5-steps": lambda: noisy_cells(bundled(), mocap, (10,), num_inference_steps=5),
        "100-steps": lambda: noisy_cells(bundled(), mocap, (10,), num_inference_steps=100),
        "depth": lambda: depth_and_reprojection(bundled(), mocap),
        "plain-ddim": lambda: noisy_cells(bundled(), mocap, (10, 50), variance="fixed_small"),
    }
    if options.runs is not None:
        items |= {f"equal-samples-{name}": partial(of_a_run, name, options, mocap) for name in RUNS}
    commit = (
        options.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    )
    for name, make in items.items():
        path = RESULTS / "validation" / f"{name}.json"
        if path.exists() or (options.only is not None and name not in options.only):
            continue
        content = {
            "command": "python -m benchmarks.accuracy.model_card --data mocap_val.npz --reference mocap_train.npz"
            + (" --runs runs" if name.startswith("equal-samples") else "")
            + f" --only {name}",
            "commit": commit,
            "versions": {"diffupose": diffupose.__version__, "torch": torch.__version__},
            "machine": platform.machine() if options.device == "cpu" else torch.cuda.get_device_name(options.device),
            **make(),
        }
        write(path, content)
        print(path, flush=True)


if __name__ == "__main__":
    main()
