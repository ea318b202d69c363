"""Sweeps over several axes: every value and every pair of values is tried, and not every combination of all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from diffupose.testing import shape_id


def pairwise(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows that hold every pair of values of two axes; every value stands in the first rows already.

    As many of them as the longest axis has values hold every value. The rest takes, row by row, what holds the most
    pairs that are missing. The result depends on the axes only.
    """
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    indices = [tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))]

    def pairs_of(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(axes)), 2)}

    missing = set().union(*map(pairs_of, combinations))
    for row in indices:
        missing -= pairs_of(row)
    while missing:
        best = max(
            itertools.product(*(range(len(axis)) for axis in axes)), key=lambda row: len(pairs_of(row) & missing)
        )
        indices.append(best)
        missing -= pairs_of(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in indices]


def sweep(quick: int | None = None, **axes: Iterable[Any]) -> Callable[[Any], Any]:
    """Parametrise a test by ``pairwise``.

    Args:
        quick: How many cases run always; the others are marked ``slow``. None: all run always.
        axes: The values of each argument of the test.
    """
    rows = pairwise([list(values) for values in axes.values()])
    cases = [
        pytest.param(
            *row,
            id="-".join(map(shape_id, row)),
            marks=[] if quick is None or index < quick else pytest.mark.slow,
        )
        for index, row in enumerate(rows)
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def mostly_slow(cases: Iterable[Any], quick: int = 1) -> list[Any]:
    """Return the cases of a parametrised test, all but the first ones marked ``slow``."""
    return [pytest.param(case, marks=[] if index < quick else pytest.mark.slow) for index, case in enumerate(cases)]
