"""One thing that is timed in several variants, against one right result and one floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.measure import Call

# Relative errors, || out - truth || / || truth ||, by the precision of the products.
LIMITS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 3e-2}


@dataclasses.dataclass
class Case:
    """What is timed.

    Args:
        name: Op and sizes.
        variants: What makes the calls of each variant; they do the same on different buffers.
        truth: Gives the right result of the first call, or of its first frames.
        bytes: The fewest that must move through the device's memory; 0 where that is not the floor.
        flops: Operations of the products; 0 where they are not the floor.
        kernel: Part of the name of the kernels whose own time is asked for, and the fewest bytes that those move.
        seconds: How long a variant may be timed.
        least: The fewest times that are taken.
        in_graph: Whether the GPU's time is asked for, by a CUDA graph, and not what the host takes to launch as well.
        other_noise: Beginnings of variants that draw noise of their own: of their results only the last, which has none
            in it, is compared.
    """

    name: str
    variants: dict[str, Callable[[], Sequence[Call]]]
    truth: Callable[[], list[Tensor]]
    bytes: int = 0
    flops: int = 0
    kernel: tuple[str, int] | None = None
    seconds: float = 1.0
    least: int = 5
    in_graph: bool = False
    other_noise: tuple[str, ...] = ()
    _truth: list[Tensor] | None = None

    def precision_of(self, variant: str) -> str:
        """Return what the products of a variant are taken in, as its name says."""
        return "bfloat16" if "bf16" in variant else "tf32" if "tf32" in variant else "float32"

    def error(self, variant: str, result: Any) -> float:
        """Return how far a variant's result is from the right one, in its own size; NaN where a number is missing."""
        values = [result] if isinstance(result, Tensor) else [value for value in result if value is not None]
        if self._truth is None:
            self._truth = self.truth()
        assert len(values) == len(self._truth), f"{len(values)} results, expected {len(self._truth)}"
        pairs = list(zip(values, self._truth, strict=True))
        worst = 0.0
        for value, truth in pairs[-1:] if variant.startswith(self.other_noise) else pairs:
            difference = (value[: len(truth)].double() - truth.double()).norm() / truth.double().norm()
            worst = max(worst, float(difference)) if difference == difference else float("nan")
            if worst != worst:
                return worst
        return worst

    def limit(self, variant: str) -> float:
        """Return the largest error with which a time counts."""
        return LIMITS[self.precision_of(variant)]

    def forget(self) -> None:
        """Free what the case keeps."""
        self._truth = None
        self.variants.clear()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
