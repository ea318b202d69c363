"""The sweeps that other tests are parametrised by."""

from __future__ import annotations

import itertools

import pytest
from support.sweeps import pairwise

AXES = [["a", "b"], [1, 2, 3, 4, 5], [None, 0.5, 1.0], [True, False]]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_pair_of_values_occurs(count):
    axes = AXES[:count]
    rows = pairwise(axes)
    assert len(set(rows)) == len(rows)
    for (i, one), (j, other) in itertools.combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))


def test_the_first_rows_hold_every_value():
    rows = pairwise(AXES)[:5]
    for column, axis in zip(zip(*rows, strict=True), AXES, strict=True):
        assert set(column) == set(axis)


def test_there_are_far_fewer_rows_than_combinations():
    assert len(pairwise([range(6), range(6), range(6)])) < 50
