"""One thing that is timed in several variants, against one right result and one floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.measure import Call
from diffupose.ops import available_backends
from diffupose.ops._backend import _DEVICE_OF, TRITON_IS_INTERPRETED

# Relative errors, || out - truth || / || truth ||, by the precision of the products.
LIMITS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 3e-2}


def backends(device: torch.device) -> list[str]:
    """Return our own backends that run on a device: all but PyTorch."""
    kinds = dict(_DEVICE_OF) | ({"triton": "cpu"} if TRITON_IS_INTERPRETED else {})
    return [name for name, kind in kinds.items() if kind == device.type and available_backends()[name][0]]


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else [value for value in result if value is not None]


@dataclasses.dataclass
class Case:
    """What is timed.

    Args:
        name: Op and sizes.
        variants: Each makes its calls, which do the same on different buffers.
        truth: Gives the right result of the first call, or of its first frames.
        bytes: The fewest that must move through the device's memory; 0 where that is not the floor.
        flops: Operations of the products; 0 where they are not the floor.
        kernel: Part of the name of the kernels that are also timed alone, and the fewest bytes that those move.
        seconds: How long a variant may be timed.
        least: How many runs are timed at least.
        in_graph: Whether a CUDA graph is timed, which leaves out what the host takes to launch.
        other_noise: Variants that begin so draw other noise: only their last result, which has none in it, is compared.
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
        """Return the precision of a variant's products, which its name says."""
        return "bfloat16" if "bf16" in variant else "tf32" if "tf32" in variant else "float32"

    def error(self, variant: str, result: Any) -> float:
        """Return the largest relative error of a variant's results; NaN where a number is missing."""
        values = tensors_of(result)
        if self._truth is None:
            self._truth = self.truth()
        assert len(values) == len(self._truth), f"{len(values)} results, expected {len(self._truth)}"
        pairs = list(zip(values, self._truth, strict=True))
        errors = [
            (value[: len(truth)].double() - truth.double()).norm() / truth.double().norm()
            for value, truth in (pairs[-1:] if variant.startswith(self.other_noise) else pairs)
        ]
        return float(torch.stack(errors).max())  # NaN if one of them is

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
