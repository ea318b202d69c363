"""hypothesis_statistics in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch

_WARPS = 4
_THREADS = 32 * _WARPS
_AT_ONCE = 16  # hypotheses of a joint that a thread of the moments reads at once
_JOINTS_IN_THREAD = 3  # of a hypothesis that is placed: with more of them fewer blocks fit a multiprocessor


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _extent(values, present):
    """Return from the smallest to the largest of those that are present; less than 0 where none is."""
    infinity = float("inf")
    return tl.max(tl.where(present, values, -infinity), axis=0) - tl.min(tl.where(present, values, infinity), axis=0)


@triton.jit
def _join(values, PARTS: tl.constexpr):
    """Return the sums of threads that are ``len(values) / PARTS`` apart, for each of them."""
    if PARTS == 1:
        return values
    else:
        items: tl.constexpr = values.shape[0] // PARTS
        total = tl.sum(tl.reshape(values, [PARTS, items]), axis=0)
        return tl.reshape(tl.broadcast_to(total[None, :], [PARTS, items]), [PARTS * items])


@triton.jit
def _moments(own, mask, part, num_hypotheses, NUMEL: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr):
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
        center_x = tl.div_rn(_join(seen * mean_x, PARTS), count)
        center_y = tl.div_rn(_join(seen * mean_y, PARTS), count)
        center_z = tl.div_rn(_join(seen * mean_z, PARTS), count)
        x, y, z = mean_x - center_x, mean_y - center_y, mean_z - center_z
        xx = _join(xx + seen * x * x, PARTS)
        yy = _join(yy + seen * y * y, PARTS)
        zz = _join(zz + seen * z * z, PARTS)
        xy = _join(xy + seen * x * y, PARTS)
        xz = _join(xz + seen * x * z, PARTS)
        yz = _join(yz + seen * y * z, PARTS)
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
def _store_moments(mean_at, covariance_at, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees):
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
    x, y, z, xx, yy, zz, xy, xz, yz = _moments(own, mask, part, num_hypotheses, numel, PARTS, AT_ONCE)
    degrees = tl.zeros(own.shape, tl.float32) + (num_hypotheses - 1 if ENOUGH else float("nan"))  # they cannot span 3D
    mask &= part == 0
    _store_moments(mean_ptr + 3 * index, covariance_ptr + 9 * index, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees)


# --- With a view: the formulas stand in diffupose/reference/hypothesis_statistics.py. ---------------------------------


@triton.jit
def _look(keypoints_ptr, confidence_ptr, at, mask, inverse_fx, inverse_fy, cx, cy):
    """Return the viewing rays' u and v, 0 where the joint is missing, and its confidence, of joints ``at``; float64."""
    weight = tl.load(confidence_ptr + at, mask=mask, other=0.0).to(tl.float64)
    present = weight > 0.0
    u = (tl.load(keypoints_ptr + 2 * at, mask=mask, other=0.0).to(tl.float64) - cx) * inverse_fx
    v = (tl.load(keypoints_ptr + 2 * at + 1, mask=mask, other=0.0).to(tl.float64) - cy) * inverse_fy
    return tl.where(present, u, 0.0), tl.where(present, v, 0.0), weight


@triton.jit
def _look_at_frames(
    keypoints_ptr, confidence_ptr, camera, frames_ptr, temperature, here,
    NUM_JOINTS: tl.constexpr, SHARED_CAMERA: tl.constexpr, FRAME_BLOCK: tl.constexpr, JOINT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep what all hypotheses of a frame share, eight numbers of float64 each."""
    frame, joint = tl.arange(0, FRAME_BLOCK), tl.arange(0, JOINT_BLOCK)
    real = frame < here
    mask = real[None, :] & (joint < NUM_JOINTS)[:, None]
    at = frame[None, :] * NUM_JOINTS + joint[:, None]
    camera += tl.where(real, 0 if SHARED_CAMERA else 9 * frame, 0)
    inverse_fx, inverse_fy = 1.0 / tl.load(camera).to(tl.float64), 1.0 / tl.load(camera + 4).to(tl.float64)
    cx, cy = tl.load(camera + 2).to(tl.float64), tl.load(camera + 5).to(tl.float64)
    u, v, weight = _look(
        keypoints_ptr, confidence_ptr, at, mask, inverse_fx[None, :], inverse_fy[None, :], cx[None, :], cy[None, :]
    )
    inverse = 1.0 / tl.sum(weight, axis=0)
    mean_u, mean_v = tl.sum(weight * u, axis=0) * inverse, tl.sum(weight * v, axis=0) * inverse
    off_u, off_v = u - mean_u[None, :], v - mean_v[None, :]
    spread = tl.sum(weight * (off_u * off_u + off_v * off_v), axis=0)
    # NaN where all rays coincide, and what is multiplied by it.
    inverse_spread = tl.where(spread * inverse > 1e-20, 1.0 / spread, float("nan"))
    present = weight > 0.0
    seen_x = tl.load(keypoints_ptr + 2 * at, mask=mask, other=0.0).to(tl.float32)
    seen_y = tl.load(keypoints_ptr + 2 * at + 1, mask=mask, other=0.0).to(tl.float32)
    side = tl.maximum(tl.maximum(_extent(seen_x, present), _extent(seen_y, present)), 2e-6)
    scale = inverse / (side * temperature).to(tl.float64)
    to = frames_ptr + 8 * frame
    tl.store(to, mean_u, mask=real)
    tl.store(to + 1, mean_v, mask=real)
    tl.store(to + 2, inverse, mask=real)
    tl.store(to + 3, inverse_spread, mask=real)
    tl.store(to + 4, inverse_fx, mask=real)
    tl.store(to + 5, inverse_fy, mask=real)
    tl.store(to + 6, scale, mask=real)


@triton.jit
def _in_row(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of LANES neighbours, for each of them."""
    total = tl.sum(tl.reshape(values, [ROWS, LANES]), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], [ROWS, LANES]), [ROWS * LANES])


@triton.jit
def _place(
    poses, keypoints_ptr, confidence_ptr, camera, frames_ptr, roots_ptr, here, num_hypotheses,
    NUM_JOINTS: tl.constexpr, SHARED_CAMERA: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Keep the hypotheses' roots and costs: a row of LANES threads for each, which takes as many joints at a time.

    The root by weighted linear least squares, NaN where it is free: t_x - u t_z = u Z - X, and the same for y; in
    float64: normal equations lose digits. The cost is the weighted mean distance of the placed pose from the keypoints
    in box sides and temperatures.
    """
    blocks: tl.constexpr = (NUM_JOINTS + LANES - 1) // LANES
    thread = tl.arange(0, ROWS * LANES)
    lane = thread % LANES
    zeros = tl.zeros((ROWS * LANES,), tl.float64)
    for begin in range(0, FRAMES * num_hypotheses, ROWS):
        row = begin + thread // LANES
        valid = row < here * num_hypotheses
        row = tl.where(valid, row, 0)
        frame = row // num_hypotheses
        own = camera + (0 if SHARED_CAMERA else 9 * frame)
        cx, cy = tl.load(own + 2).to(tl.float64), tl.load(own + 5).to(tl.float64)
        kept = frames_ptr + 8 * frame
        mean_u, mean_v = tl.load(kept), tl.load(kept + 1)
        inverse_fx, inverse_fy = tl.load(kept + 4), tl.load(kept + 5)
        sum_u, sum_v, depth = zeros, zeros, zeros
        for block in tl.static_range(blocks):
            joint = block * LANES + lane
            mask = joint < NUM_JOINTS
            at = poses + row * (3 * NUM_JOINTS) + 3 * joint
            x = tl.load(at, mask=mask, other=0.0).to(tl.float64)
            y = tl.load(at + 1, mask=mask, other=0.0).to(tl.float64)
            z = tl.load(at + 2, mask=mask, other=0.0).to(tl.float64)
            u, v, weight = _look(
                keypoints_ptr, confidence_ptr, frame * NUM_JOINTS + joint, mask, inverse_fx, inverse_fy, cx, cy
            )
            right_u, right_v = u * z - x, v * z - y
            sum_u += weight * right_u
            sum_v += weight * right_v
            depth -= weight * ((u - mean_u) * right_u + (v - mean_v) * right_v)
        inverse, inverse_spread = tl.load(kept + 2), tl.load(kept + 3)
        depth = _in_row(depth, ROWS, LANES) * inverse_spread
        root_x = (_in_row(sum_u, ROWS, LANES) * inverse + mean_u * depth).to(tl.float32)
        root_y = (_in_row(sum_v, ROWS, LANES) * inverse + mean_v * depth).to(tl.float32)
        root_z = depth.to(tl.float32)
        fx, fy = tl.load(own).to(tl.float32), tl.load(own + 4).to(tl.float32)
        near_x, near_y = cx.to(tl.float32), cy.to(tl.float32)
        near_fx, near_fy = inverse_fx.to(tl.float32), inverse_fy.to(tl.float32)
        distance = tl.zeros((ROWS * LANES,), tl.float32)
        for block in tl.static_range(blocks):
            joint = block * LANES + lane
            mask = joint < NUM_JOINTS
            at = poses + row * (3 * NUM_JOINTS) + 3 * joint
            x = tl.load(at, mask=mask, other=0.0)
            y = tl.load(at + 1, mask=mask, other=0.0)
            z = tl.load(at + 2, mask=mask, other=0.0)
            at = frame * NUM_JOINTS + joint
            weight = tl.load(confidence_ptr + at, mask=mask, other=0.0).to(tl.float32)
            # In float32, which takes fewer registers than what stood above.
            u = (tl.load(keypoints_ptr + 2 * at, mask=mask, other=0.0).to(tl.float32) - near_x) * near_fx
            v = (tl.load(keypoints_ptr + 2 * at + 1, mask=mask, other=0.0).to(tl.float32) - near_y) * near_fy
            off_x, off_y, z = _off(x, y, z, root_x, root_y, root_z, u, v)
            off_x, off_y = fx * off_x, fy * off_y
            # Behind the camera there is no image.
            pixels = tl.where(z > 1e-3, tl.sqrt(off_x * off_x + off_y * off_y) / z, float("inf"))
            distance += tl.where(weight > 0.0, pixels * weight, 0.0)
        cost = _in_row(distance, ROWS, LANES) * tl.load(kept + 6).to(tl.float32)
        # One of a row's threads writes all four.
        writes = valid & (lane == 0)
        to = roots_ptr + 4 * row
        tl.store(to, root_x, mask=writes)
        tl.store(to + 1, root_y, mask=writes)
        tl.store(to + 2, root_z, mask=writes)
        tl.store(to + 3, cost, mask=writes)


@triton.jit
def _off(x, y, z, root_x, root_y, root_z, u, v):
    """Return how far placed joints lie from their rays, sideways in metres, and their depths.

    Divided by the depth it is what a keypoint is off, in focal lengths: as a difference of metres it loses no digits.
    """
    z += root_z
    return x + root_x - u * z, y + root_y - v * z, z


@triton.jit
def _weigh(roots_ptr, weights_ptr, here, num_hypotheses, FRAME_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr):
    """Write e^-cost over their sum; all alike where no hypothesis can be placed."""
    infinity = float("inf")
    frame = tl.arange(0, FRAME_BLOCK)
    real = (frame < here)[None, :]
    start = frame[None, :] * num_hypotheses
    lowest = tl.full((FRAME_BLOCK,), infinity, tl.float32)
    for begin in range(0, num_hypotheses, BLOCK_H):
        hypothesis = begin + tl.arange(0, BLOCK_H)[:, None]
        there = real & (hypothesis < num_hypotheses)
        cost = tl.load(roots_ptr + 4 * (start + hypothesis) + 3, mask=there, other=infinity)
        lowest = tl.minimum(lowest, tl.min(tl.where(cost < infinity, cost, infinity), axis=0))  # NaN is infinite
    nowhere = (lowest == infinity)[None, :]
    total = tl.zeros((FRAME_BLOCK,), tl.float32)
    for begin in range(0, num_hypotheses, BLOCK_H):
        hypothesis = begin + tl.arange(0, BLOCK_H)[:, None]
        there = real & (hypothesis < num_hypotheses)
        cost = tl.load(roots_ptr + 4 * (start + hypothesis) + 3, mask=there, other=infinity)
        likelihood = tl.exp(lowest[None, :] - tl.where(cost < infinity, cost, infinity))
        total += tl.sum(tl.where(there, tl.where(nowhere, 1.0, likelihood), 0.0), axis=0)
    for begin in range(0, num_hypotheses, BLOCK_H):
        hypothesis = begin + tl.arange(0, BLOCK_H)[:, None]
        there = real & (hypothesis < num_hypotheses)
        cost = tl.load(roots_ptr + 4 * (start + hypothesis) + 3, mask=there, other=infinity)
        likelihood = tl.exp(lowest[None, :] - tl.where(cost < infinity, cost, infinity))
        weight = tl.div_rn(tl.where(nowhere, 1.0, likelihood), total[None, :] + tl.zeros_like(cost))
        tl.store(weights_ptr + start + hypothesis, weight, mask=there)


@triton.jit
def _sum_up(
    own, mask, part, u, v, roots, weights, sums_ptr, num_hypotheses, stride,
    NUMEL: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Keep nine sums over the hypotheses of the joints at ``own`` ``[BLOCK]``, ``stride`` apart."""
    zeros = tl.zeros(own.shape, tl.float32)
    seen_x, seen_y, seen_square = zeros, zeros, zeros
    depth, root_depth, side_x, side_y = zeros, zeros, zeros, zeros
    free_x, free_y, free_z = zeros, zeros, zeros
    for begin in range(0, num_hypotheses, PARTS * AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            hypothesis = begin + part + i * PARTS
            there = mask & (hypothesis < num_hypotheses)
            at = own + hypothesis * NUMEL
            x = tl.load(at, mask=there, other=0.0)
            y = tl.load(at + 1, mask=there, other=0.0)
            z = tl.load(at + 2, mask=there, other=0.0)
            at = roots + 4 * hypothesis
            root_x = tl.load(at, mask=there, other=0.0)
            root_y = tl.load(at + 1, mask=there, other=0.0)
            root_z = tl.load(at + 2, mask=there, other=0.0)
            weight = tl.load(weights + hypothesis, mask=there, other=0.0)
            off_x, off_y, far = _off(x, y, z, root_x, root_y, root_z, u, v)
            inverse = tl.where(there, 1.0 / far, 0.0)
            q_x, q_y = off_x * inverse, off_y * inverse
            seen_x += q_x
            seen_y += q_y
            seen_square += q_x * q_x + q_y * q_y
            # What cannot be placed stays where it is.
            placed = _is_finite(root_x) & _is_finite(root_y) & _is_finite(root_z)
            depth += tl.where(placed, weight * z, 0.0)
            root_depth += tl.where(placed, weight * root_z, 0.0)
            side_x += tl.where(placed, weight * off_x, 0.0)
            side_y += tl.where(placed, weight * off_y, 0.0)
            free_x += tl.where(placed, 0.0, weight * x)
            free_y += tl.where(placed, 0.0, weight * y)
            free_z += tl.where(placed, 0.0, weight * z)
    share = 1.0 / (zeros + num_hypotheses)
    mean_x, mean_y = _join(seen_x, PARTS) * share, _join(seen_y, PARTS) * share
    offset = mean_x * mean_x + mean_y * mean_y
    variance = _join(seen_square, PARTS) * share - offset
    mask &= part == 0
    tl.store(sums_ptr, offset, mask=mask)
    tl.store(sums_ptr + stride, tl.where(variance < 0.0, 0.0, variance), mask=mask)  # NaN stays NaN
    tl.store(sums_ptr + 2 * stride, _join(depth, PARTS), mask=mask)
    tl.store(sums_ptr + 3 * stride, _join(root_depth, PARTS), mask=mask)
    tl.store(sums_ptr + 4 * stride, _join(side_x, PARTS), mask=mask)
    tl.store(sums_ptr + 5 * stride, _join(side_y, PARTS), mask=mask)
    tl.store(sums_ptr + 6 * stride, _join(free_x, PARTS), mask=mask)
    tl.store(sums_ptr + 7 * stride, _join(free_y, PARTS), mask=mask)
    tl.store(sums_ptr + 8 * stride, _join(free_z, PARTS), mask=mask)


@triton.jit
def _of_root(values, joint):
    """Return the first joint's value of each frame, ``[1, FRAME_BLOCK]``."""
    return tl.sum(tl.where((joint == 0)[:, None], values, 0.0), axis=0)[None, :]


@triton.jit
def _refine(
    keypoints_ptr, confidence_ptr, camera, frames_ptr, sums_ptr, weighted_mean_ptr, way, here, stride,
    NUM_JOINTS: tl.constexpr, SHARED_CAMERA: tl.constexpr,
    FRAME_BLOCK: tl.constexpr, JOINT_BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted mean of the moved poses, of sums of what moves with a joint's share of the way and what does not."""
    frame, joint = tl.arange(0, FRAME_BLOCK), tl.arange(0, JOINT_BLOCK)
    real = frame < here
    mask = real[None, :] & (joint < NUM_JOINTS)[:, None]
    at = frame[None, :] * NUM_JOINTS + joint[:, None]
    own = camera + tl.where(real, 0 if SHARED_CAMERA else 9 * frame, 0)
    kept = frames_ptr + 8 * frame
    inverse_fx, inverse_fy = tl.load(kept + 4, mask=real, other=0.0), tl.load(kept + 5, mask=real, other=0.0)
    cx, cy = tl.load(own + 2).to(tl.float64), tl.load(own + 5).to(tl.float64)
    u, v, weight = _look(
        keypoints_ptr, confidence_ptr, at, mask, inverse_fx[None, :], inverse_fy[None, :], cx[None, :], cy[None, :]
    )
    present = weight > 0.0
    # Which part of the way to its ray a joint goes: S / (S + R), where that has a value.
    offset = tl.load(sums_ptr + at, mask=mask, other=0.0)
    variance = tl.load(sums_ptr + stride + at, mask=mask, other=0.0)
    usual = tl.sum(tl.where(present, offset, 0.0), axis=0) / tl.sum(present.to(tl.float32), axis=0)
    usual = usual[None, :] + tl.zeros_like(offset)
    share = tl.div_rn(variance, variance + tl.where(offset > usual, offset, usual))
    share = tl.where(_is_finite(share), share, 0.0) * (way * tl.minimum(weight.to(tl.float32), 1.0))
    depth = tl.load(sums_ptr + 2 * stride + at, mask=mask, other=0.0)
    far = depth + tl.load(sums_ptr + 3 * stride + at, mask=mask, other=0.0)
    # No hypothesis of the frame is placed where a ray is no number.
    u, v = u.to(tl.float32), v.to(tl.float32)
    u, v = tl.where(_is_finite(u), u, 0.0), tl.where(_is_finite(v), v, 0.0)
    x = u * far + (1.0 - share) * tl.load(sums_ptr + 4 * stride + at, mask=mask, other=0.0)
    y = v * far + (1.0 - share) * tl.load(sums_ptr + 5 * stride + at, mask=mask, other=0.0)
    x = x - _of_root(x, joint) + tl.load(sums_ptr + 6 * stride + at, mask=mask, other=0.0)
    y = y - _of_root(y, joint) + tl.load(sums_ptr + 7 * stride + at, mask=mask, other=0.0)
    z = depth - _of_root(depth, joint) + tl.load(sums_ptr + 8 * stride + at, mask=mask, other=0.0)
    to = weighted_mean_ptr + 3 * at
    tl.store(to, x, mask=mask)
    tl.store(to + 1, y, mask=mask)
    tl.store(to + 2, z, mask=mask)


@triton.jit
def hypothesis_statistics_kernel(
    hypotheses_ptr,  # [B, H, J, 3]
    keypoints_ptr,  # [B, J, 2]
    confidence_ptr,  # [B, J]
    intrinsics_ptr,  # [B or 1, 3, 3]
    mean_ptr,  # [B, J, 3]
    covariance_ptr,  # [B, J, 3, 3]
    weights_ptr,  # [B, H]
    weighted_mean_ptr,  # [B, J, 3]
    frames_ptr,  # [B, 8], float64, of use in here alone; as is
    roots_ptr,  # [B, H, 4], and the cost
    way,  # to its ray, the part of it that a joint goes at most
    temperature,
    num_frames,
    num_hypotheses,
    COUNT: tl.constexpr,  # the same where they are few, else 0
    SHARED_CAMERA: tl.constexpr,
    ENOUGH: tl.constexpr,
    NUM_JOINTS: tl.constexpr,
    FRAMES: tl.constexpr,
    FRAME_BLOCK: tl.constexpr,
    JOINT_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WEIGHTS_H: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    SECTORS: tl.constexpr,
):
    """FRAMES frames, whose hypotheses are read from memory once, all of them at once, and then from the cache.

    A thread takes a joint of a frame for what is summed over hypotheses, and some joints of a hypothesis to place it;
    they find each other's results in memory that the block has just written.
    """
    num_hypotheses = COUNT if COUNT > 0 else num_hypotheses
    first = tl.program_id(0).to(tl.int64) * FRAMES
    here = tl.minimum(num_frames - first, FRAMES).to(tl.int32)
    poses = hypotheses_ptr + first * num_hypotheses * (3 * NUM_JOINTS)
    keypoints_ptr += first * (2 * NUM_JOINTS)
    confidence_ptr += first * NUM_JOINTS
    camera = intrinsics_ptr if SHARED_CAMERA else intrinsics_ptr + 9 * first
    frames_ptr += 8 * first
    roots_ptr += first * num_hypotheses * 4
    weights_ptr += first * num_hypotheses
    mean_ptr += first * (3 * NUM_JOINTS)
    covariance_ptr += first * (9 * NUM_JOINTS)
    # One number of every 32 bytes: all of it is on its way before the first of it is used.
    sector = 8 * tl.arange(0, SECTORS)
    ahead = tl.load(poses + sector, mask=sector < here * num_hypotheses * (3 * NUM_JOINTS), other=0.0)
    _look_at_frames(
        keypoints_ptr, confidence_ptr, camera, frames_ptr, temperature, here,
        NUM_JOINTS, SHARED_CAMERA, FRAME_BLOCK, JOINT_BLOCK,
    )  # fmt: skip

    tl.debug_barrier()

    _place(
        poses, keypoints_ptr, confidence_ptr, camera, frames_ptr, roots_ptr, here, num_hypotheses,
        NUM_JOINTS, SHARED_CAMERA, FRAMES, ROWS, LANES,
    )  # fmt: skip
    tl.debug_barrier()
    _weigh(roots_ptr, weights_ptr, here, num_hypotheses, FRAME_BLOCK, WEIGHTS_H)
    tl.debug_barrier()

    thread = tl.arange(0, PARTS * BLOCK)
    item, part = thread % BLOCK, thread // BLOCK
    mask = item < here * NUM_JOINTS
    frame = tl.where(mask, item // NUM_JOINTS, 0)
    own = poses + frame.to(tl.int64) * num_hypotheses * (3 * NUM_JOINTS) + 3 * (item % NUM_JOINTS)
    camera_at = camera + (0 if SHARED_CAMERA else 9 * frame)
    cx, cy = tl.load(camera_at + 2).to(tl.float64), tl.load(camera_at + 5).to(tl.float64)
    inverse_fx, inverse_fy = tl.load(frames_ptr + 8 * frame + 4), tl.load(frames_ptr + 8 * frame + 5)
    u, v, _ = _look(keypoints_ptr, confidence_ptr, item, mask, inverse_fx, inverse_fy, cx, cy)
    u, v = u.to(tl.float32), v.to(tl.float32)
    # What is summed lies where the covariance comes at the end.
    _sum_up(
        own, mask, part, u, v, roots_ptr + 4 * num_hypotheses * frame, weights_ptr + num_hypotheses * frame,
        covariance_ptr + item, num_hypotheses, here * NUM_JOINTS, 3 * NUM_JOINTS, PARTS, 2,
    )  # fmt: skip
    tl.debug_barrier()
    _refine(
        keypoints_ptr, confidence_ptr, camera, frames_ptr, covariance_ptr, weighted_mean_ptr + first * (3 * NUM_JOINTS),
        way, here, here * NUM_JOINTS, NUM_JOINTS, SHARED_CAMERA, FRAME_BLOCK, JOINT_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    x, y, z, xx, yy, zz, xy, xz, yz = _moments(own, mask, part, num_hypotheses, 3 * NUM_JOINTS, PARTS, AT_ONCE)
    degrees = tl.zeros(own.shape, tl.float32) + (num_hypotheses - 1 if ENOUGH else float("nan"))  # they cannot span 3D
    mask &= part == 0
    _store_moments(mean_ptr + 3 * item, covariance_ptr + 9 * item, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees)
    # Kept, so that it is read at all.
    tl.store(frames_ptr + 7, tl.sum(ahead, axis=0).to(tl.float64))


def hypothesis_statistics(
    hypotheses: Tensor,
    keypoints_2d: Tensor | None,
    confidence: Tensor | None,
    intrinsics: Tensor | None,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, covariance, reprojection weights and weighted mean; the last two are empty without keypoints.

    Arguments and result are those of ``diffupose.ops.hypothesis_statistics``, which also checks them; hypotheses are
    float32. A frame's result is the same bit for bit whatever stands beside it.
    """
    hypotheses = hypotheses.contiguous()
    frames, count, joints, _ = hypotheses.shape
    mean, covariance = hypotheses.new_empty(frames, joints, 3), hypotheses.new_empty(frames, joints, 3, 3)
    weights, weighted_mean = hypotheses.new_empty(0), hypotheses.new_empty(0)
    # Few hypotheses are a constant: nothing is made for more.
    few = count if count <= _AT_ONCE else 0
    if keypoints_2d is None:
        parts = min(8, _launch.next_power_of_2(triton.cdiv(count, _AT_ONCE)))
        block = max(32, _THREADS // parts)
        _launch.launch(
            moments_kernel,
            (triton.cdiv(frames * joints, block),),
            hypotheses, mean, covariance, frames * joints, count,
            COUNT=few, ENOUGH=count >= 4, NUM_JOINTS=joints, PARTS=parts, AT_ONCE=few or _AT_ONCE, BLOCK=block,
            num_warps=parts * block // 32, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, covariance, weights, weighted_mean
    weights, weighted_mean = hypotheses.new_empty(frames, count), torch.empty_like(mean)
    view = [None if tensor is None else tensor.contiguous() for tensor in (keypoints_2d, confidence, intrinsics)]
    kept = hypotheses.new_empty(frames, 8, dtype=torch.float64)
    roots = hypotheses.new_empty(frames, count, 4)
    per_program = max(1, min(_THREADS // joints, 64 // count))
    block = max(32, _launch.next_power_of_2(per_program * joints))
    lanes = _launch.next_power_of_2(triton.cdiv(joints, _JOINTS_IN_THREAD))
    _launch.launch(
        hypothesis_statistics_kernel,
        (triton.cdiv(frames, per_program),),
        hypotheses, *view, mean, covariance, weights, weighted_mean, kept, roots, weight, temperature, frames, count,
        COUNT=few, SHARED_CAMERA=intrinsics is not None and intrinsics.ndim == 2, ENOUGH=count >= 4, NUM_JOINTS=joints,
        FRAMES=per_program, FRAME_BLOCK=_launch.next_power_of_2(per_program),
        JOINT_BLOCK=_launch.next_power_of_2(joints), BLOCK=block, PARTS=max(1, _THREADS // block), AT_ONCE=few or 8,
        WEIGHTS_H=min(_launch.next_power_of_2(count), 1024), ROWS=max(1, _THREADS // lanes), LANES=lanes,
        SECTORS=min(_launch.next_power_of_2(per_program * count * joints * 3 // 8 + 1), 1024),
        num_warps=_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, covariance, weights, weighted_mean
