"""Mean and covariance of every joint over the hypotheses in Triton.

Nine sums give both, in this order: x, y, z, xx, yy, zz, xy, xz, yz. They are sums of differences from an origin near
the mean: squares of large numbers would lose digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rough_mean(pointers, mask, num_hypotheses, NUMEL: tl.constexpr, SAMPLED: tl.constexpr):
    """Return x, y, z: the mean of SAMPLED hypotheses for the joints at ``pointers`` ``[BLOCK]``.

    It is the first hypothesis plus the mean difference from it. So equal hypotheses have exactly that mean.
    """
    x = tl.load(pointers, mask=mask, other=0.0)
    y = tl.load(pointers + 1, mask=mask, other=0.0)
    z = tl.load(pointers + 2, mask=mask, other=0.0)
    sum_x, sum_y, sum_z = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for i in tl.static_range(1, SAMPLED):
        sampled = pointers + i * (num_hypotheses // SAMPLED) * NUMEL
        sum_x += tl.load(sampled, mask=mask, other=0.0) - x
        sum_y += tl.load(sampled + 1, mask=mask, other=0.0) - y
        sum_z += tl.load(sampled + 2, mask=mask, other=0.0) - z
    # A sum that is not finite is left out: the origin is then the first hypothesis itself.
    sum_x, sum_y, sum_z = sum_x * (1.0 / SAMPLED), sum_y * (1.0 / SAMPLED), sum_z * (1.0 / SAMPLED)
    infinity = float("inf")
    return (
        x + tl.where(tl.abs(sum_x) < infinity, sum_x, 0.0), y + tl.where(tl.abs(sum_y) < infinity, sum_y, 0.0),
        z + tl.where(tl.abs(sum_z) < infinity, sum_z, 0.0),
    )  # fmt: skip


@triton.jit
def add_to_sums(x, y, z, sums):
    """Return the nine sums with one more difference from the origin."""
    sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = sums
    return (
        sum_x + x, sum_y + y, sum_z + z,
        xx + x * x, yy + y * y, zz + z * z, xy + x * y, xz + x * z, yz + y * z,
    )  # fmt: skip


@triton.jit
def moments_of(origin, sums, num_hypotheses, HAS_COVARIANCE: tl.constexpr):
    """Return mean and covariance as x, y, z, xx, yy, zz, xy, xz, yz from the nine sums."""
    sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = sums
    per_hypothesis = 1.0 / num_hypotheses
    mean_x, mean_y, mean_z = sum_x * per_hypothesis, sum_y * per_hypothesis, sum_z * per_hypothesis
    per_degree = 1.0 / (num_hypotheses - 1) if HAS_COVARIANCE else float("nan")
    xx = (xx - sum_x * mean_x) * per_degree
    yy = (yy - sum_y * mean_y) * per_degree
    zz = (zz - sum_z * mean_z) * per_degree
    xy = (xy - sum_x * mean_y) * per_degree
    xz = (xz - sum_x * mean_z) * per_degree
    yz = (yz - sum_y * mean_z) * per_degree
    return origin[0] + mean_x, origin[1] + mean_y, origin[2] + mean_z, xx, yy, zz, xy, xz, yz


@triton.jit
def stack_columns(a, b, c, d):
    """Return ``[N, 4]`` from four ``[N]``, and ``[N, 16]`` from four ``[N, 4]``, whose columns alternate."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [.., 2, 2]; the last axis is the outer pair
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
    COUNT: tl.constexpr,  # num_hypotheses if they are few, else 0
    HAS_COVARIANCE: tl.constexpr,  # else it is NaN
    NUM_JOINTS: tl.constexpr,
    SAMPLED: tl.constexpr,  # hypotheses that give the origin of the sums
    UNROLLED: tl.constexpr,  # hypotheses whose loads are in flight together
    BLOCK: tl.constexpr,
):
    """Compute mean and covariance alone, for BLOCK joints: one joint of one frame per thread."""
    numel: tl.constexpr = 3 * NUM_JOINTS
    num_hypotheses = COUNT if COUNT > 0 else num_hypotheses
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    frame = begin // NUM_JOINTS
    thread = tl.arange(0, BLOCK)
    item = (begin - frame * NUM_JOINTS).to(tl.int32) + thread  # counts joints from the first one of that frame
    index = begin + thread
    mask = index < total
    pointers = hypotheses_ptr + (frame + item // NUM_JOINTS) * num_hypotheses * numel + item % NUM_JOINTS * 3
    origin = rough_mean(pointers, mask, num_hypotheses, numel, SAMPLED)
    x, y, z = origin
    sums = (tl.zeros_like(x),) * 9
    for start in range(0, num_hypotheses, UNROLLED):
        for i in tl.static_range(UNROLLED):
            hypothesis = tl.zeros_like(thread) + (start + i)  # a tensor in Triton's interpreter, too
            exists = mask & (hypothesis < num_hypotheses)
            joint = pointers + i * numel
            sums = add_to_sums(
                tl.load(joint, mask=exists, other=x) - x, tl.load(joint + 1, mask=exists, other=y) - y,
                tl.load(joint + 2, mask=exists, other=z) - z, sums,
            )  # fmt: skip
        pointers += UNROLLED * numel
    x, y, z, xx, yy, zz, xy, xz, yz = moments_of(origin, sums, num_hypotheses, HAS_COVARIANCE)
    # A store of one number in nine costs as much as a store of all nine, so a row is stored at once.
    column = tl.arange(0, 4)
    rows = mean_ptr + 3 * index
    tl.store(rows[:, None] + column[None, :], stack_columns(x, y, z, z), mask=mask[:, None] & (column < 3)[None, :])
    # The columns are xx xy xz xy | yy yz xz yz | zz and padding.
    matrix = stack_columns(
        stack_columns(xx, yy, zz, zz), stack_columns(xy, yz, yz, yz), stack_columns(xz, xz, xz, xz),
        stack_columns(xy, yz, yz, yz),
    )  # fmt: skip
    column = tl.arange(0, 16)
    rows = covariance_ptr + 9 * index
    tl.store(rows[:, None] + column[None, :], matrix, mask=mask[:, None] & (column < 9)[None, :])
