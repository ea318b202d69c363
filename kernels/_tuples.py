"""Arithmetic on tuples of tensors in Triton, and sums of several tensors for ``tl.reduce``.

One reduction of several tensors is faster than several of one: threads wait for each other once per reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_two(a0, a1, b0, b1):
    """Return the sums of two pairs."""
    return a0 + b0, a1 + b1


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    """Return the sums of three pairs."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    """Return the sums of four pairs."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def add_nine(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    """Return the sums of nine pairs."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def add_where(condition, sums, values):
    """Return a tuple of ``sum + value``, or of ``sum`` where the condition is false."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + tl.where(condition, values[i], 0.0),)
    return added


@triton.jit
def select(condition, values, others):
    """Return a tuple of ``tl.where(condition, value, other)``."""
    selected = ()
    for i in tl.static_range(len(values)):
        selected = selected + (tl.where(condition, values[i], others[i]),)
    return selected


@triton.jit
def zero_unless(condition, values):
    """Return the tuple of values with 0 where the condition is false."""
    kept = ()
    for i in tl.static_range(len(values)):
        kept = kept + (tl.where(condition, values[i], 0.0),)
    return kept


@triton.jit
def rescale_and_add(sums, change, likelihood, values):
    """Return a tuple of ``sum * change + likelihood * value``."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] * change + likelihood * values[i],)
    return added
