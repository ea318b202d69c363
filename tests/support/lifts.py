"""What tests of the lifter share."""

from __future__ import annotations

from torch import Tensor

SIZE = (1000, 800)  # of the images that the people of ``tiny_lifters`` are in
CLOSE = 1e-5  # metres


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two tensors."""
    return float((first - second).abs().max())
