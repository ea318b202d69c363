"""Mean, covariance, reprojection weights and weighted mean of hypotheses in Triton.

The formulas stand in ``diffupose/reference/hypothesis_statistics.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffupose.kernels.hypothesis_moments import join, moments, store_moments


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _extent(values, present):
    """Return from the smallest to the largest of those that are present; less than 0 where none is."""
    infinity = float("inf")
    return tl.max(tl.where(present, values, -infinity), axis=0) - tl.min(tl.where(present, values, infinity), axis=0)


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
    mean_x, mean_y = join(seen_x, PARTS) * share, join(seen_y, PARTS) * share
    offset = mean_x * mean_x + mean_y * mean_y
    variance = join(seen_square, PARTS) * share - offset
    mask &= part == 0
    tl.store(sums_ptr, offset, mask=mask)
    tl.store(sums_ptr + stride, tl.where(variance < 0.0, 0.0, variance), mask=mask)  # NaN stays NaN
    tl.store(sums_ptr + 2 * stride, join(depth, PARTS), mask=mask)
    tl.store(sums_ptr + 3 * stride, join(root_depth, PARTS), mask=mask)
    tl.store(sums_ptr + 4 * stride, join(side_x, PARTS), mask=mask)
    tl.store(sums_ptr + 5 * stride, join(side_y, PARTS), mask=mask)
    tl.store(sums_ptr + 6 * stride, join(free_x, PARTS), mask=mask)
    tl.store(sums_ptr + 7 * stride, join(free_y, PARTS), mask=mask)
    tl.store(sums_ptr + 8 * stride, join(free_z, PARTS), mask=mask)


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
    x, y, z, xx, yy, zz, xy, xz, yz = moments(own, mask, part, num_hypotheses, 3 * NUM_JOINTS, PARTS, AT_ONCE)
    degrees = tl.zeros(own.shape, tl.float32) + (num_hypotheses - 1 if ENOUGH else float("nan"))  # they cannot span 3D
    mask &= part == 0
    store_moments(mean_ptr + 3 * item, covariance_ptr + 9 * item, mask, x, y, z, xx, yy, zz, xy, xz, yz, degrees)
    # Kept, so that it is read at all.
    tl.store(frames_ptr + 7, tl.sum(ahead, axis=0).to(tl.float64))
