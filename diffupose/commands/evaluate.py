"""``diffupose evaluate mocap``: the table of both rigs, clean and noisy."""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path

from diffupose.commands.say import say
from diffupose.files import atomic_path, check_output


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("evaluate", help="score a model", description="Score a model on known poses.")
    data_sets = parser.add_subparsers(title="data sets", required=True, metavar="DATASET")
    mocap = data_sets.add_parser(
        "mocap",
        help="motion capture through virtual cameras",
        description="Tier raw has no intrinsics, tier camera has them. Errors are in millimetres. Only rows and "
        "columns named oracle choose poses by the ground truth. Without --data: a bundled sample of 300 poses of one "
        "person.",
    )
    mocap.add_argument("--data", metavar="NPZ", help="motion capture to evaluate on")
    mocap.add_argument("--reference", metavar="NPZ", help="training motion capture for the baselines")
    mocap.add_argument("--model", default="mocap", metavar="NAME|PATH", help="model (default: %(default)s, bundled)")
    mocap.add_argument("--tier", choices=("raw", "camera"), default="raw", help="camera: the intrinsics are known")
    mocap.add_argument("--regressor", metavar="PATH", help="deterministic model to compare with")
    mocap.add_argument("--num-hypotheses", type=int, nargs="+", default=[1, 10], metavar="N")
    mocap.add_argument("--num-inference-steps", type=int, metavar="S", help="default: the model's")
    mocap.add_argument("--full", action="store_true", help="all poses instead of 1,000 a cell")
    mocap.add_argument("--seed", type=int, default=0)
    mocap.add_argument("--device", default="auto")
    mocap.add_argument("--json", metavar="PATH", help="write the scores as JSON, too")
    mocap.set_defaults(run=run_mocap)


def run_mocap(options: argparse.Namespace) -> None:
    """Load, score, print."""
    from tqdm import tqdm

    from diffupose.datasets.mocap import SAMPLE_SUBJECTS, load_mocap
    from diffupose.evaluation.mocap import POSES_PER_CELL, evaluate_mocap, format_table
    from diffupose.lifting.lifter import Lifter

    if min(options.num_hypotheses) < 1:
        raise ValueError(f"--num-hypotheses must be at least 1, got {min(options.num_hypotheses)}")
    if options.json is not None:
        names = ("data", "reference", "model", "regressor")
        inputs = {f"--{name}": getattr(options, name) for name in names}
        check_output(options.json, "--json", inputs)
    lifter = Lifter.from_pretrained(options.model, device=options.device)
    regressor = None
    if options.regressor is not None:
        try:
            regressor = Lifter.from_pretrained(options.regressor, device=options.device)
        except FileNotFoundError as error:  # its message names --model
            raise FileNotFoundError(f"--regressor {str(error).removeprefix('model ')}") from None
    with resources.as_file(resources.files("diffupose") / "data" / "sample_uiprmd.npz") as sample:
        if options.data is None:
            mocap, name = load_mocap(sample, include=SAMPLE_SUBJECTS), "bundled sample"
        else:
            mocap, name = load_mocap(options.data), options.data
        if options.reference is not None:
            reference, reference_name = load_mocap(options.reference), options.reference
        else:
            reference, reference_name = load_mocap(sample, exclude=SAMPLE_SUBJECTS), "bundled sample of training poses"
    scores = evaluate_mocap(
        lifter,
        mocap,
        reference,
        tier=options.tier,
        regressor=regressor,
        num_hypotheses=sorted(set(options.num_hypotheses)),
        num_poses=None if options.full else POSES_PER_CELL,
        num_inference_steps=options.num_inference_steps,
        seed=options.seed,
        progress=lambda cells: tqdm(cells, unit="cell", leave=False, disable=None),
    )
    scores |= {"data": Path(name).name, "reference": Path(reference_name).name}
    settings = scores["settings"]
    if options.json is not None:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    say(
        f"data: {name}, {scores['num_poses']} poses a cell; baselines from {reference_name}, "
        f"{scores['num_reference_poses']} poses\n"
        f"model: {settings['model']}, {settings['sampler']} in {settings['num_inference_steps']} steps, no flips, "
        f"{scores['num_joints']} joints with the root, seed {scores['seed']}\n"
        f"tier {options.tier}: {'no' if options.tier == 'raw' else 'with'} intrinsics; errors in mm against "
        "motion-capture joints, root-relative; 'oracle' uses the truth\n"
    )
    say(format_table(scores))
