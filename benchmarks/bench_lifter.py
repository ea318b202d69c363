"""What users feel: time of a lift with the bundled model and of the released network's shape."""

from __future__ import annotations

import pytest
import torch

from diffupose import Lifter
from diffupose.checkpoint import LifterFile
from diffupose.config import PAPER
from diffupose.networks.build import build_denoiser


def lifter_of(name: str) -> Lifter:
    if name == "mocap":
        return Lifter.from_pretrained("mocap")
    torch.manual_seed(0)  # the time does not depend on the weights
    file = LifterFile(PAPER, build_denoiser(PAPER.denoiser), torch.zeros(17, 3), torch.ones(17, 3), torch.ones(17))
    return Lifter(file, "cuda" if torch.cuda.is_available() else "cpu")


SIZES = [("mocap", 5, frames, hypotheses) for frames in (1, 32) for hypotheses in (1, 10, 50)]
SIZES += [("paper", 10, 1, 1), ("paper", 10, 1, 10), ("paper", 10, 32, 1)]


@pytest.mark.parametrize(("model", "num_steps", "num_frames", "num_hypotheses"), SIZES)
@pytest.mark.benchmark(group="lifter")
def bench_lift(benchmark, timed, model, num_steps, num_frames, num_hypotheses):
    lifter = lifter_of(model)
    keypoints = 500.0 + 100.0 * torch.randn(num_frames, 17, 2, generator=torch.Generator().manual_seed(0))
    benchmark.extra_info.update(model=model, steps=num_steps, poses=num_frames * num_hypotheses)
    call = timed(
        lifter,
        keypoints,
        image_size=(1000, 1000),
        num_hypotheses=num_hypotheses,
        num_inference_steps=num_steps,
        flip=False,
    )
    result = benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    assert bool(torch.isfinite(result.hypotheses).all())
