"""The ladder: variants of model and recipe at equal data and equal samples, scored on the selection subjects.

python -m benchmarks.accuracy.ladder --data mocap_train.npz [--only NAME ...] [--list]

A queue of short runs. One that was stopped goes on where it was, one that has its result is not run again. Each result
is a JSON file in ``benchmarks/results/ablation/`` with the command that made it. ``ladder_report.py`` makes the table
and the plots of ``docs/ablation.md`` from them. ``mocap_val.npz`` is never looked at.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.accuracy.scores import RESULTS, score, write
from diffupose import Lifter
from diffupose.datasets.mocap import SELECTION_SUBJECTS, load_mocap
from diffupose.evaluation.fit_uncertainty import calibration_cells, measure_prediction_error
from diffupose.evaluation.mocap import undistorted

RUNS = Path("runs/ablation")
# Some cmu subjects carry cmu_01's bone lengths: bodies are ranked on two people of whom nothing is in the fit.
BODY_SUBJECTS = ("uiprmd_s10", "uiprmd_s08")

NUM_STEPS, BATCH_SIZE = 5000, 128
NUM_POSES, NUM_HYPOTHESES = 300, 10

# The released recipe: mirrored samples are its only augmentation, pixels over the image's width its coordinates.
PAPER = "--preset paper --hidden-dim 96 --no-vary-bodies --no-vary-cameras --noise-scale 0"
# The same network and objective on the augmented data, seen in the person's box.
PERSON = "--preset paper --hidden-dim 96 --input-normalization person"
STANDARD = "standardize_poses=true diffusion.clip_sample_range=null"
PARALLEL = "--preset parallel --hidden-dim 64"


@dataclass(frozen=True)
class Rung:
    """A variant: flags of ``diffupose train``, and whether intrinsics are known at the lift."""

    name: str
    what: str
    flags: str
    model: str = ""
    seed: int = 0
    subjects: tuple[str, ...] = SELECTION_SUBJECTS
    camera: bool = False


_LADDER = (
    Rung("parallel", "graph convolution beside attention, x0 standardised, time in every block", PARALLEL),
    Rung("limbs-0.25", "limbs exchanged between people, probability 0.25", f"{PARALLEL} --exchange-limbs 0.25"),
    Rung("v-prediction", "v instead of x0", PARALLEL, "diffusion.prediction_type=v_prediction"),
    Rung("no-attention", "no attention, width 80 for equal parameters", "--preset parallel --hidden-dim 80",
         "denoiser.num_heads=0"),
    Rung("six-blocks", "six blocks, width 56, 14 % more parameters",
         "--preset parallel --hidden-dim 56 --num-layers 6"),
    Rung("two-blocks", "two blocks, width 88 for equal parameters", "--preset parallel --hidden-dim 88 --num-layers 2"),
    Rung("mask", "mask P of the paper", PARALLEL, "denoiser.adjacency_mask=true"),
    Rung("epsilon", "epsilon instead of x0", PARALLEL, "diffusion.prediction_type=epsilon"),
    Rung("constant-lr", "constant learning rate 3e-4", f"{PARALLEL} --lr-schedule constant --lr 3e-4"),
    Rung("no-noise", "trained on clean keypoints only", f"{PARALLEL} --noise-scale 0"),
    Rung("no-missing", "trained on noisy keypoints of which none is missing", f"{PARALLEL} --missing-scale 0"),
    Rung("missing-only", "trained on exact keypoints of which some are missing",
         f"{PARALLEL} --noise-scale 0 --missing-scale 2"),
    Rung("metres", "x0 in metres, not standardised", PARALLEL, "standardize_poses=false"),
    Rung("time-last", "time in the last block only", PARALLEL, "denoiser.time_in_every_block=false"),
    Rung("no-presence", "missing joints filled instead of a presence channel", PARALLEL,
         "denoiser.condition_channels=2"),
    Rung("l1", "absolute instead of squared error", f"{PARALLEL} --loss l1"),
    Rung("bodies", "as parallel, ranked on two people whose bones nobody in the fit has", PARALLEL,
         subjects=BODY_SUBJECTS),
    Rung("no-bodies", "no variation of bone lengths, ranked as bodies", f"{PARALLEL} --no-vary-bodies",
         subjects=BODY_SUBJECTS),
    Rung("camera-cue", "angular size and direction as condition, half of the time", PARALLEL,
         "denoiser.camera_cue=true"),
    Rung("camera-cue-used", "the same model, with intrinsics at the lift", PARALLEL, "denoiser.camera_cue=true",
         camera=True),
    Rung("regressor", "deterministic regressor of the trunk of parallel", PARALLEL, "diffusion.deterministic=true"),
    Rung("paper-1e-3", "the released network and recipe, learning rate 1e-3", f"{PAPER} --lr 1e-3"),
    Rung("paper-3e-4", "the same, 3e-4", f"{PAPER} --lr 3e-4"),
    Rung("paper-3e-3", "the same, 3e-3", f"{PAPER} --lr 3e-3"),
    Rung("paper-person", "paper on augmented data in the person's box", f"{PERSON} --lr 1e-3"),
    Rung("paper-time", "and time between the graph blocks", f"{PERSON} --lr 1e-3", "denoiser.time_blocks=between"),
    Rung("paper-standard", "and x0 standardised, no clamp", f"{PERSON} --lr 1e-3",
         f"denoiser.time_blocks=between {STANDARD}"),
    Rung("paper-x0", "and x0 predicted, squared error", f"{PERSON} --lr 1e-3 --loss mse",
         f"denoiser.time_blocks=between {STANDARD} diffusion.prediction_type=sample"),
)  # fmt: skip

# Rungs within 2 % of another one, which one seed does not rank.
TIED = ("parallel", "v-prediction", "mask", "camera-cue", "camera-cue-used", "bodies", "no-bodies", "limbs-0.25",
        "paper-1e-3", "paper-3e-3", "paper-person", "paper-time", "no-attention", "time-last", "l1",
        "six-blocks", "two-blocks", "constant-lr", "no-missing", "metres")  # fmt: skip
RUNGS = _LADDER + tuple(
    replace(rung, name=f"{rung.name}-s{seed}", what=f"{rung.name}, another seed", seed=seed)
    for name in TIED
    for rung in _LADDER
    if rung.name == name
    for seed in (1, 2)
)


def train_command(rung: Rung, data: str) -> list[str]:
    """Return the command that trains a rung."""
    model = f"--model {rung.model}" if rung.model else ""
    # Runs that differ in the lift only share their training.
    folder = RUNS / rung.name.replace("-used", "")
    return shlex.split(
        f"diffupose train {rung.flags} {model} --data {data} --output {folder} --steps {NUM_STEPS} "
        f"--batch-size {BATCH_SIZE} --seed {rung.seed} --exclude-subjects {' '.join(rung.subjects)} "
        f"--precision bfloat16 --compile --validate-every 2500"
    )


def run(rung: Rung, data: str) -> dict[str, object]:
    """Train (or go on training) a rung and score it."""
    command = train_command(rung, data)
    folder = Path(command[command.index("--output") + 1])
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "diffupose.cli", *command[1:], "--resume", "--quiet"], check=True)
    lifter = Lifter.from_pretrained(folder / "model.safetensors", device="cpu")
    cells = calibration_cells(load_mocap(data, include=rung.subjects), NUM_POSES)
    if not lifter.config.diffusion.deterministic:
        lifter.prediction_error = measure_prediction_error(lifter, cells)
    scores = {}
    for cell in cells:
        keypoints, intrinsics = undistorted(cell) if rung.camera else (cell.keypoints, None)
        result = cell.lift(lifter, keypoints, intrinsics=intrinsics, num_hypotheses=NUM_HYPOTHESES)
        scores[cell.name] = score(lifter, cell, result)
    log = (folder / "log.csv").read_text().splitlines()
    names = log[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in log[1:]]
    return {
        "rung": rung.name,
        "what": rung.what,
        "command": shlex.join(command).replace(data, Path(data).name),
        "subjects": list(rung.subjects),
        "parameters": sum(value.numel() for value in lifter.denoiser.parameters()),
        "samples": NUM_STEPS * BATCH_SIZE,
        "training_seconds": float(rows[-1]["seconds"]),
        "seconds": time.perf_counter() - began,
        "curve": [[int(row["step"]), *(float(row[f"val_{rig}_mm"]) for rig in ("h36m", "wild"))]
                  for row in rows if row["val_h36m_mm"]],
        "num_hypotheses": NUM_HYPOTHESES,
        "num_poses": NUM_POSES,
        "cells": scores,
    }  # fmt: skip


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="NPZ", help="mocap_train.npz")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the rungs and their commands")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {rung.name for rung in RUNGS}
    if unknown:
        parser.error(f"--only must name rungs (see --list), got {', '.join(sorted(unknown))}")
    chosen = [rung for rung in RUNGS if options.only is None or rung.name in options.only]
    if options.list:
        for rung in chosen:
            print(f"{rung.name}: {rung.what}\n    {shlex.join(train_command(rung, options.data or 'NPZ'))}")
        return
    if options.data is None or not Path(options.data).is_file():
        parser.error(f"--data must be an npz of motion capture, got {options.data}")
    for rung in chosen:
        path = RESULTS / "ablation" / f"{rung.name}.json"
        if path.exists():
            continue
        result = run(rung, options.data)
        write(path, result)
        cells = result["cells"]
        print(rung.name, *(f"{name}: {row['mpjpe']:.1f} mm, energy {row['energy_score']:.1f}"  # type: ignore[index]
                           for name, row in cells.items()), f"{result['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
