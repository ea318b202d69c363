"""Mean and covariance of every joint over the hypotheses in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_nine(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    """Return the sums of nine pairs."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def shift_of(own, mask, num_hypotheses, NUMEL: tl.constexpr, FEW: tl.constexpr):
    """Return means of FEW hypotheses, of the joints at ``own`` ``[BLOCK]``: what sums of squares are taken off from.

    So near they lose no digits. In differences from the first, so that equal hypotheses have exactly that mean.
    """
    x = tl.load(own, mask=mask, other=0.0)
    y = tl.load(own + 1, mask=mask, other=0.0)
    z = tl.load(own + 2, mask=mask, other=0.0)
    sum_x, sum_y, sum_z = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for i in tl.static_range(1, FEW):
        at = own + i * (num_hypotheses // FEW) * NUMEL
        sum_x += tl.load(at, mask=mask, other=0.0) - x
        sum_y += tl.load(at + 1, mask=mask, other=0.0) - y
        sum_z += tl.load(at + 2, mask=mask, other=0.0) - z
    # Where one is infinite the first itself: then so is the mean.
    sum_x, sum_y, sum_z = sum_x * (1.0 / FEW), sum_y * (1.0 / FEW), sum_z * (1.0 / FEW)
    infinity = float("inf")
    return (
        x + tl.where(tl.abs(sum_x) < infinity, sum_x, 0.0), y + tl.where(tl.abs(sum_y) < infinity, sum_y, 0.0),
        z + tl.where(tl.abs(sum_z) < infinity, sum_z, 0.0),
    )  # fmt: skip


@triton.jit
def add_products(x, y, z, sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz):
    """Add differences from a shift to their sums, and their products to theirs."""
    return (
        sum_x + x, sum_y + y, sum_z + z,
        xx + x * x, yy + y * y, zz + z * z, xy + x * y, xz + x * z, yz + y * z,
    )  # fmt: skip


@triton.jit
def moments_of(x, y, z, sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz, num_hypotheses, ENOUGH: tl.constexpr):
    """Return mean and covariance, x, y, z, xx, yy, zz, xy, xz, yz, of sums of differences from the shift x, y, z."""
    share = 1.0 / num_hypotheses
    mean_x, mean_y, mean_z = sum_x * share, sum_y * share, sum_z * share
    per_degree = 1.0 / (num_hypotheses - 1) if ENOUGH else float("nan")  # fewer cannot span 3D
    xx = (xx - sum_x * mean_x) * per_degree
    yy = (yy - sum_y * mean_y) * per_degree
    zz = (zz - sum_z * mean_z) * per_degree
    xy = (xy - sum_x * mean_y) * per_degree
    xz = (xz - sum_x * mean_z) * per_degree
    yz = (yz - sum_y * mean_z) * per_degree
    return x + mean_x, y + mean_y, z + mean_z, xx, yy, zz, xy, xz, yz


@triton.jit
def beside(a, b, c, d):
    """Return ``[N, 4]`` of four ``[N]``, ``[N, 16]`` of four ``[N, 4]`` whose columns alternate."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [.., 2, 2], of which the last one is outer
    if len(a.shape) == 1:
        return tl.reshape(joined, [a.shape[0], 4])
    else:
        return tl.reshape(joined, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def moments_kernel(
    hypotheses_ptr,  # [B, H, J, 3]
    mean_ptr,  # [B, J, 3]
    covariance_ptr,  # [B, J, 3, 3]
    total,  # B J
    num_hypotheses,
    COUNT: tl.constexpr,  # the same where they are few, else 0
    ENOUGH: tl.constexpr,
    NUM_JOINTS: tl.constexpr,
    FEW: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and covariance alone, of BLOCK joints of frames: a thread for each reads AT_ONCE hypotheses at once."""
    numel: tl.constexpr = 3 * NUM_JOINTS
    num_hypotheses = COUNT if COUNT > 0 else num_hypotheses
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    frame = begin // NUM_JOINTS
    thread = tl.arange(0, BLOCK)
    item = (begin - frame * NUM_JOINTS).to(tl.int32) + thread  # from that frame's first joint
    index = begin + thread
    mask = index < total
    own = hypotheses_ptr + (frame + item // NUM_JOINTS) * num_hypotheses * numel + item % NUM_JOINTS * 3
    x, y, z = shift_of(own, mask, num_hypotheses, numel, FEW)
    zeros = tl.zeros_like(x)
    sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, num_hypotheses, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            hypothesis = tl.zeros_like(thread) + (start + i)  # a tensor also where the interpreter has numbers
            there = mask & (hypothesis < num_hypotheses)
            at = own + i * numel
            sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = add_products(
                tl.load(at, mask=there, other=x) - x, tl.load(at + 1, mask=there, other=y) - y,
                tl.load(at + 2, mask=there, other=z) - z, sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz,
            )  # fmt: skip
        own += AT_ONCE * numel
    x, y, z, xx, yy, zz, xy, xz, yz = moments_of(
        x, y, z, sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz, num_hypotheses, ENOUGH
    )
    # Neighbours together, as a store of one number in nine costs as much as all nine.
    column = tl.arange(0, 4)
    at = mean_ptr + 3 * index
    tl.store(at[:, None] + column[None, :], beside(x, y, z, z), mask=mask[:, None] & (column < 3)[None, :])
    # xx xy xz xy | yy yz xz yz | zz
    matrix = beside(beside(xx, yy, zz, zz), beside(xy, yz, yz, yz), beside(xz, xz, xz, xz), beside(xy, yz, yz, yz))
    column = tl.arange(0, 16)
    at = covariance_ptr + 9 * index
    tl.store(at[:, None] + column[None, :], matrix, mask=mask[:, None] & (column < 9)[None, :])
