"""Turn a calibrated lifter into the bundled checkpoint: fp16 weights and a name.

python tools/bundle_model.py runs/base-calibrated.safetensors mocap
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from diffupose.checkpoint import save_lifter_file
from diffupose.networks.build import load_lifter_file

MODELS = Path(__file__).resolve().parents[1] / "diffupose" / "models"


def main() -> None:
    """Write ``diffupose/models/NAME.safetensors``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lifter", help="what diffupose calibrate wrote")
    parser.add_argument("name")
    options = parser.parse_args()
    file = load_lifter_file(options.lifter)
    config = replace(file.config, name=options.name)
    path = MODELS / f"{options.name}.safetensors"
    save_lifter_file(
        path,
        file.denoiser,
        config,
        file.pose_mean,
        file.pose_scale,
        file.covariance_scale,
        file.prediction_error,
        dtype=torch.float16,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
