"""What users feel: a whole lift with the bundled model, from keypoints on the host to hypotheses on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.gpu.every_op import backends
from benchmarks.workloads import networks
from benchmarks.workloads.case import Case
from benchmarks.workloads.measure import Call
from diffupose import Lifter

# Frames, hypotheses of each.
SIZES = ((1, 10), (1024, 10))
SMALL = ((2, 3),)


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Return the cases of a device."""
    for frames, hypotheses in SMALL if small else SIZES:
        yield case(frames, hypotheses, device)


def case(frames: int, hypotheses: int, device: torch.device) -> Case:
    """Return one size, with the model's own steps: our engine, Triton where it is, and the plain module."""
    keypoints = 500.0 + 100.0 * torch.randn(frames, 17, 2, generator=torch.Generator().manual_seed(0))
    steps = lifter_on(device).sampling().num_inference_steps

    def lift(backend: str | None, precision: str, few: int = frames) -> Tensor:
        result = lifter_on(device)(
            keypoints[:few], image_size=(1000, 1000), num_hypotheses=hypotheses, backend=backend, precision=precision
        )
        return result.hypotheses

    def calls(backend: str | None, precision: str) -> Sequence[Call]:
        return [partial(lift, backend, precision)]

    variants: dict[str, Callable[[], Sequence[Call]]] = {
        f"{backend}-{short}": partial(calls, backend, precision)
        for backend in backends(device)
        for short, precision in (("bf16", "bfloat16"), ("fp32", "float32"))
    }
    variants["eager-fp32"] = partial(calls, "torch", "float32")
    return Case(
        f"lift mocap, B={frames}, N={hypotheses}, {steps} steps",
        variants,
        lambda: [lift("torch", "float32", min(frames, 8))],
        flops=networks.flops("mocap") * frames * hypotheses * steps,
        seconds=1.0,
    )


@cache
def lifter_on(device: torch.device) -> Lifter:
    """Return the bundled lifter on a device."""
    return Lifter.from_pretrained(device=str(device))
