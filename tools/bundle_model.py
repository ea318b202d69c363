"""Turn the lifter of a training run into the bundled checkpoint: fp16 weights, a name, its sampling defaults.

python tools/bundle_model.py runs/parallel/model.safetensors mocap --num-inference-steps 10
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from diffupose.checkpoint import load_lifter_file, save_lifter_file

MODELS = Path(__file__).resolve().parents[1] / "diffupose" / "models"


def main() -> None:
    """Write ``diffupose/models/NAME.safetensors``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lifter", help="model.safetensors of a training run")
    parser.add_argument("name")
    parser.add_argument("--num-inference-steps", type=int, help="default number of steps, if not the preset's")
    options = parser.parse_args()
    file = load_lifter_file(options.lifter)
    sampling = file.config.sampling
    if options.num_inference_steps is not None:
        sampling = replace(sampling, num_inference_steps=options.num_inference_steps)
    config = replace(file.config, name=options.name, sampling=sampling)
    path = MODELS / f"{options.name}.safetensors"
    save_lifter_file(
        path,
        file.denoiser,
        config,
        file.pose_mean,
        file.pose_scale,
        file.covariance_scale,
        dtype=torch.float16,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
