"""The ladder: variants of model and recipe at equal data and equal samples, scored on the selection subjects.

python -m benchmarks.accuracy.ladder --data mocap_train.npz --only NAME ... [--list]
python -m benchmarks.accuracy.ladder --data mocap_train.npz --new NAME --what TEXT [--camera] -- FLAGS OF TRAIN

Each rung is a JSON file in ``benchmarks/results/ablation/`` with the command that made it. The first line runs rungs
again by their commands, the second adds one. A run that was stopped goes on where it was. ``ladder_report.py`` makes
the table and the plots of ``docs/ablation.md`` from the files. ``mocap_val.npz`` is never looked at.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.scores import RESULTS, score, write
from diffupose import Lifter
from diffupose.datasets.mocap import SELECTION_SUBJECTS, load_mocap
from diffupose.evaluation.fit_uncertainty import calibration_cells, measure_prediction_error
from diffupose.evaluation.mocap import undistorted

RUNS = Path("runs/ablation")
NUM_STEPS, BATCH_SIZE = 5000, 128
NUM_POSES, NUM_HYPOTHESES = 300, 10


@dataclass(frozen=True)
class Rung:
    """A variant: the command that trains it, and whether intrinsics are known at the lift."""

    name: str
    what: str
    command: list[str]
    subjects: tuple[str, ...] = SELECTION_SUBJECTS
    camera: bool = False


def rungs() -> dict[str, Rung]:
    """Return the rungs that have a result, by name."""
    found = {}
    for path in sorted((RESULTS / "ablation").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        name, command = content["rung"], shlex.split(content["command"])
        camera = content.get("camera", "camera-cue-used" in name)
        found[name] = Rung(name, content["what"], command, tuple(content["subjects"]), camera)
    return found


def new_rung(name: str, what: str, flags: list[str], camera: bool) -> Rung:
    """Return a rung that trains by flags of its own, and like the others in the rest."""
    command = (
        f"diffupose train {shlex.join(flags)} --data NPZ --output {RUNS / name} --steps {NUM_STEPS} --batch-size "
        f"{BATCH_SIZE} --exclude-subjects {' '.join(SELECTION_SUBJECTS)} --precision bfloat16 --compile "
        "--validate-every 2500"
    )
    return Rung(name, what, shlex.split(command), camera=camera)


def run(rung: Rung, data: str) -> dict[str, object]:
    """Train (or go on training) a rung and score it."""
    command = list(rung.command)
    command[command.index("--data") + 1] = data
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
        "camera": rung.camera,
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
    """Run what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="NPZ", help="mocap_train.npz")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="rungs to run again")
    parser.add_argument("--list", action="store_true", help="print the rungs and their commands")
    parser.add_argument("--new", metavar="NAME", help="a rung to add")
    parser.add_argument("--what", metavar="TEXT", default="", help="what is new about it")
    parser.add_argument("--camera", action="store_true", help="it is lifted with intrinsics")
    parser.add_argument("flags", nargs="*", help="its flags of `diffupose train`, after --")
    options = parser.parse_args()
    known = rungs()
    if options.list:
        for rung in known.values():
            print(f"{rung.name}: {rung.what}\n    {shlex.join(rung.command)}")
        return
    if unknown := set(options.only) - set(known):
        parser.error(f"--only must name rungs (see --list), got {', '.join(sorted(unknown))}")
    if options.data is None or not Path(options.data).is_file():
        parser.error(f"--data must be an npz of motion capture, got {options.data}")
    chosen = [known[name] for name in options.only]
    if options.new:
        chosen.append(new_rung(options.new, options.what, options.flags, options.camera))
    for rung in chosen:
        result = run(rung, options.data)
        write(RESULTS / "ablation" / f"{rung.name}.json", result)
        cells = result["cells"]
        print(rung.name, *(f"{name}: {row['mpjpe']:.1f} mm, energy {row['energy_score']:.1f}"  # type: ignore[index]
                           for name, row in cells.items()), f"{result['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
