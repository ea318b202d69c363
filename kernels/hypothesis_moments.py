"""Mean and covariance of every joint over the hypotheses in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join(values, PARTS: tl.constexpr):
    """Return the sums of threads that are ``len(values) / PARTS`` apart, for each of them."""
    if PARTS == 1:
        return values
    else:
        items: tl.constexpr = values.shape[0] // PARTS
        total = tl.sum(tl.reshape(values, [PARTS, items]), axis=0)
        return tl.reshape(tl.broadcast_to(total[None, :], [PARTS, items]), [PARTS * items])


@triton.jit
def moments(own, mask, part, num_hypotheses, NUMEL: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return means and sums of products of differences from them, of the joints at ``own`` ``[BLOCK]``.

    A thread takes every PARTS-th hypothesis, AT_ONCE at a time, which are read at once: their mean and products of
    differences from it, which are then joined to those before (Chan et al. 1983): no digits are lost however long the
    sum. In differences from the first hypothesis, so that equal ones have exactly that mean and products of zero.
    """
    first_x = tl.load(own, mask=mask, other=0.0)
    first_y = tl.load(own + 1, mask=mask, other=0.0)
    first_z = tl.load(own + 2, mask=mask, other=0.0)
    zeros = tl.zeros(own.shape, tl.float32)
    seen = zeros
    mean_x, mean_y, mean_z = zeros, zeros, zeros
    xx, yy, zz, xy, xz, yz = zeros, zeros, zeros, zeros, zeros, zeros
    for begin in range(0, num_hypotheses, PARTS * AT_ONCE):
        center_x, center_y, center_z, size = zeros, zeros, zeros, zeros
        for i in tl.static_range(AT_ONCE):
            hypothesis = begin + part + i * PARTS
            there = mask & (hypothesis < num_hypotheses)
            at = own + hypothesis * NUMEL
            center_x += tl.where(there, tl.load(at, mask=there, other=0.0) - first_x, 0.0)
            center_y += tl.where(there, tl.load(at + 1, mask=there, other=0.0) - first_y, 0.0)
            center_z += tl.where(there, tl.load(at + 2, mask=there, other=0.0) - first_z, 0.0)
            size += there.to(tl.float32)
        some = tl.maximum(size, 1.0)
        center_x = tl.div_rn(center_x, some)
        center_y = tl.div_rn(center_y, some)
        center_z = tl.div_rn(center_z, some)
        for i in tl.static_range(AT_ONCE):
            hypothesis = begin + part + i * PARTS
            there = mask & (hypothesis < num_hypotheses)
            at = own + hypothesis * NUMEL
            x = tl.where(there, tl.load(at, mask=there, other=0.0) - first_x - center_x, 0.0)
            y = tl.where(there, tl.load(at + 1, mask=there, other=0.0) - first_y - center_y, 0.0)
            z = tl.where(there, tl.load(at + 2, mask=there, other=0.0) - first_z - center_z, 0.0)
            xx += x * x
            yy += y * y
            zz += z * z
            xy += x * y
            xz += x * z
            yz += y * z
        both = seen + size
        share = tl.div_rn(size, tl.maximum(both, 1.0))
        x, y, z = center_x - mean_x, center_y - mean_y, center_z - mean_z
        seen *= share
        xx += seen * x * x
        yy += seen * y * y
        zz += seen * z * z
        xy += seen * x * y
        xz += seen * x * z
        yz += seen * y * z
        mean_x += share * x
        mean_y += share * y
        mean_z += share * z
        seen = both
    if PARTS > 1:
        count = zeros + num_hypotheses
        center_x = tl.div_rn(join(seen * mean_x, PARTS), count)
        center_y = tl.div_rn(join(seen * mean_y, PARTS), count)
        center_z = tl.div_rn(join(seen * mean_z, PARTS), count)
        x, y, z = mean_x - center_x, mean_y - center_y, mean_z - center_z
        xx = join(xx + seen * x * x, PARTS)
        yy = join(yy + seen * y * y, PARTS)
        zz = join(zz + seen * z * z, PARTS)
        xy = join(xy + seen * x * y, PARTS)
        xz = join(xz + seen * x * z, PARTS)
        yz = join(yz + seen * y * z, PARTS)
        mean_x, mean_y, mean_z = center_x, center_y, center_z
    return first_x + mean_x, first_y + mean_y, first_z + mean_z, xx, yy, zz, xy, xz, yz


@triton.jit
def _beside(a, b, c, d):
    """Return ``[N, 4]`` of four ``[N]``, ``[N, 16]`` of four ``[N, 4]`` whose columns alternate."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))  # [.., 2, 2], of which the last one is outer
    if len(a.shape) == 1:
        return tl.reshape(joined, [a.shape[0], 4])
    else:
        return tl.reshape(joined, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def store_moments(mean_at, covariance_at, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees):
    """Store means and covariances; neighbours together, as a store of one number in nine costs as much as all nine."""
    column = tl.arange(0, 4)
    tl.store(mean_at[:, None] + column[None, :], _beside(x, y, z, z), mask=mask[:, None] & (column < 3)[None, :])
    xx, yy, zz = tl.div_rn(xx, degrees), tl.div_rn(yy, degrees), tl.div_rn(zz, degrees)
    xy, xz, yz = tl.div_rn(xy, degrees), tl.div_rn(xz, degrees), tl.div_rn(yz, degrees)
    # xx xy xz xy | yy yz xz yz | zz
    matrix = _beside(_beside(xx, yy, zz, zz), _beside(xy, yz, yz, yz), _beside(xz, xz, xz, xz), _beside(xy, yz, yz, yz))
    column = tl.arange(0, 16)
    tl.store(covariance_at[:, None] + column[None, :], matrix, mask=mask[:, None] & (column < 9)[None, :])


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
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and covariance alone, of BLOCK joints of frames; PARTS threads for each."""
    numel: tl.constexpr = 3 * NUM_JOINTS
    num_hypotheses = COUNT if COUNT > 0 else num_hypotheses
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    frame = begin // NUM_JOINTS
    thread = tl.arange(0, PARTS * BLOCK)
    part = thread // BLOCK
    item = (begin - frame * NUM_JOINTS).to(tl.int32) + thread % BLOCK  # from that frame's first joint
    index = begin + thread % BLOCK
    mask = index < total
    own = hypotheses_ptr + (frame + item // NUM_JOINTS) * num_hypotheses * numel + item % NUM_JOINTS * 3
    x, y, z, xx, yy, zz, xy, xz, yz = moments(own, mask, part, num_hypotheses, numel, PARTS, AT_ONCE)
    degrees = tl.zeros(own.shape, tl.float32) + (num_hypotheses - 1 if ENOUGH else float("nan"))  # they cannot span 3D
    mask &= part == 0
    store_moments(mean_ptr + 3 * index, covariance_ptr + 9 * index, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees)
