"""``diffupose calibrate``: fit a model's uncertainty on people that it was not fitted on."""

from __future__ import annotations

import argparse

from diffupose.commands.say import say
from diffupose.datasets.mocap import SELECTION_SUBJECTS
from diffupose.files import check_output


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="fit a model's uncertainty",
        description="Measure a model's prediction error (for variance analytic) and fit the factors of its covariance. "
        "Both use noisy keypoints of people that the model was not fitted on. Write a model that holds both.",
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="lifter of a training run")
    parser.add_argument("--data", required=True, metavar="NPZ", help="motion capture")
    parser.add_argument("--out", required=True, metavar="PATH", help="safetensors to write")
    parser.add_argument(
        "--subjects", nargs="+", default=list(SELECTION_SUBJECTS), metavar="NAME",
        help="people to fit on, none of whom the model was trained on (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--num-poses", type=int, default=1000, help="poses for each rig of cameras (default: %(default)s)"
    )
    parser.add_argument(
        "--noise-factor", type=float, nargs="+", default=[1.0], metavar="F",
        help="factor of the measured error, one number or three for x (across), y (down) and z (depth); above 1 it "
        "widens the spread of variance analytic",
    )  # fmt: skip
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="sampling defaults, e.g. eta=0.5")
    parser.add_argument("--device", default="auto")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, fit, write."""
    from dataclasses import replace

    import torch

    from diffupose.config import override
    from diffupose.datasets.mocap import load_mocap
    from diffupose.evaluation.fit_uncertainty import calibration_cells, fit_covariance_scale, measure_prediction_error
    from diffupose.lifting.lifter import Lifter
    from diffupose.metrics import coverage, dispersion, expected_calibration_error
    from diffupose.schedule import inference_timesteps

    if options.num_poses < 2:
        raise ValueError(f"--num-poses must be at least 2, got {options.num_poses}")
    factors = options.noise_factor
    if len(factors) not in (1, 3) or not all(0 < factor <= 100 for factor in factors):
        given = " ".join(f"{factor:g}" for factor in factors)
        raise ValueError(f"--noise-factor must be 1 or 3 numbers, positive and at most 100, got {given}")
    check_output(options.out, "--out", {"--model": options.model, "--data": options.data}, (".safetensors",))
    lifter = Lifter.from_pretrained(options.model, device=options.device)
    known = vars(lifter.config.sampling)
    for item in options.set:
        name, equals, _ = item.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set must look like eta=0.5, with one of {', '.join(known)}, got {item!r}")
    values = override(lifter.config.to_dict(), [f"sampling.{item}" for item in options.set])["sampling"]
    sampling = lifter.sampling(**{name: values[name] for name in (item.partition("=")[0] for item in options.set)})
    # Settings that cannot be sampled are reported before minutes of measuring.
    inference_timesteps(lifter.schedule.num_train_timesteps, sampling.num_inference_steps, sampling.timestep_spacing)
    lifter.config = replace(lifter.config, sampling=sampling)
    if factors != [1.0] and lifter.config.sampling.variance != "analytic":
        raise ValueError(
            f"--noise-factor is for variance analytic, this model has {lifter.config.sampling.variance}: "
            "give --set variance=analytic"
        )
    cells = calibration_cells(load_mocap(options.data, include=options.subjects), options.num_poses)
    lifter.prediction_error = torch.tensor(factors) * measure_prediction_error(lifter, cells).cpu()
    scale = fit_covariance_scale(lifter, cells)
    lifter.covariance_scale = scale.to(lifter.device)
    lifter.save_pretrained(options.out)
    for cell in cells:
        hypotheses, poses_3d = cell.lift(lifter, num_hypotheses=10).hypotheses.cpu(), cell.views.poses_3d
        value = float(dispersion(hypotheses, poses_3d))
        say(f"dispersion on {cell.name} keypoints, N = 10, before any factor: {value:.2f} (1 is calibrated)")
        error = float(expected_calibration_error(coverage(hypotheses, poses_3d, scale=scale))[0])
        say(f"calibration error (ECE) with the factors, N = 10: {error:.3f} (0 is calibrated)")
    say(f"covariance factors, by joint: {' '.join(f'{factor:.2f}' for factor in scale.tolist())}")
    say(f"calibrated model: {options.out}")
