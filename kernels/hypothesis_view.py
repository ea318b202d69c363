"""Mean, covariance, reprojection weights and weighted mean of hypotheses in Triton.

The formulas stand in ``diffupose/reference/hypothesis_statistics.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffupose.kernels.hypothesis_moments import add_products, hypothesis_of, join_nine, shift_of, store_moments


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


# Several reductions at once, as threads wait for each other in each of them.
@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _larger_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _longer_side(x, y, present):
    """Return the longer side of the box around those that are present; less than 0 where none is."""
    nowhere = -float("inf")
    ends = (
        tl.where(present, x, nowhere), tl.where(present, -x, nowhere),
        tl.where(present, y, nowhere), tl.where(present, -y, nowhere),
    )  # fmt: skip
    right, left, bottom, top = tl.reduce(ends, 0, _larger_four)
    return tl.maximum(right + left, bottom + top)


@triton.jit
def _look(
    keypoints_ptr, confidence_ptr, camera, frames_ptr, rays_ptr, slopes_ptr, temperature, here,
    NUM_JOINTS: tl.constexpr, SHARED_CAMERA: tl.constexpr, FRAME_BLOCK: tl.constexpr, JOINT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep what all hypotheses of a frame share: of a joint its ray u, v, 0 where it is missing, and its confidence.

    Beside them the slopes by which misses of the rays change the depth, and of the frame five numbers. In float64, as
    rays that are nearly parallel differ in their last digits; rounded when that is done.
    """
    frame, joint = tl.arange(0, FRAME_BLOCK), tl.arange(0, JOINT_BLOCK)
    real = frame < here
    mask = real[None, :] & (joint < NUM_JOINTS)[:, None]
    at = frame[None, :] * NUM_JOINTS + joint[:, None]
    camera += tl.where(real, 0 if SHARED_CAMERA else 9 * frame, 0)
    fx, fy = tl.load(camera).to(tl.float64), tl.load(camera + 4).to(tl.float64)
    cx, cy = tl.load(camera + 2).to(tl.float64), tl.load(camera + 5).to(tl.float64)
    confidence = tl.load(confidence_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(keypoints_ptr + 2 * at, mask=mask, other=0.0)
    y = tl.load(keypoints_ptr + 2 * at + 1, mask=mask, other=0.0)
    present, weight = confidence > 0.0, confidence.to(tl.float64)
    u = tl.where(present, (x.to(tl.float64) - cx[None, :]) * (1.0 / fx)[None, :], 0.0)
    v = tl.where(present, (y.to(tl.float64) - cy[None, :]) * (1.0 / fy)[None, :], 0.0)
    total, mean_u, mean_v = tl.reduce((weight, weight * u, weight * v), 0, _add_three)
    inverse = 1.0 / total
    mean_u, mean_v = mean_u * inverse, mean_v * inverse
    off_u, off_v = u - mean_u[None, :], v - mean_v[None, :]
    spread = tl.sum(weight * (off_u * off_u + off_v * off_v), axis=0)
    # NaN where all rays coincide, and what is multiplied by it.
    part = weight * tl.where(spread * inverse > 1e-20, 1.0 / spread, float("nan"))[None, :]
    tl.store(rays_ptr + 3 * at, u.to(tl.float32), mask=mask)
    tl.store(rays_ptr + 3 * at + 1, v.to(tl.float32), mask=mask)
    tl.store(rays_ptr + 3 * at + 2, confidence, mask=mask)
    tl.store(slopes_ptr + 3 * at, (part * off_u).to(tl.float32), mask=mask)
    tl.store(slopes_ptr + 3 * at + 1, (part * off_v).to(tl.float32), mask=mask)
    side = _longer_side(x.to(tl.float32), y.to(tl.float32), present)
    to = frames_ptr + 8 * frame
    tl.store(to, mean_u.to(tl.float32), mask=real)
    tl.store(to + 1, mean_v.to(tl.float32), mask=real)
    tl.store(to + 2, inverse.to(tl.float32), mask=real)
    # Errors are in units of fx until they become costs.
    tl.store(to + 3, (fy / fx).to(tl.float32), mask=real)
    scale = (tl.abs(fx) * inverse).to(tl.float32) / (tl.maximum(side, 2e-6) * temperature)
    tl.store(to + 4, scale, mask=real)


@triton.jit
def _in_row(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return the sums of LANES neighbours, for each of them."""
    total = tl.sum(tl.reshape(values, [ROWS, LANES]), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], [ROWS, LANES]), [ROWS * LANES])


@triton.jit
def _place(
    poses, frames_ptr, rays_ptr, slopes_ptr, roots_ptr, here, num_hypotheses,
    NUM_JOINTS: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Keep the hypotheses' roots and costs: a row of LANES threads for each, which takes as many joints at a time.

    The root by weighted linear least squares, NaN where it is free: t_x - u t_z = u Z - X, and the same for y. With
    rays off their mean, float32 loses nothing that the cost would show: a depth that is off moves the pose along its
    rays. The cost is the weighted mean distance of the placed pose from the keypoints in box sides and temperatures.
    """
    blocks: tl.constexpr = (NUM_JOINTS + LANES - 1) // LANES
    thread = tl.arange(0, ROWS * LANES)
    lane = thread % LANES
    zeros = tl.zeros((ROWS * LANES,), tl.float32)
    for begin in range(0, FRAMES * num_hypotheses, ROWS):
        row = begin + thread // LANES
        valid = row < here * num_hypotheses
        row = tl.where(valid, row, 0)
        frame = row // num_hypotheses
        sum_x, sum_y, depth = zeros, zeros, zeros
        for block in tl.static_range(blocks):
            joint = block * LANES + lane
            mask = joint < NUM_JOINTS
            at = poses + row * (3 * NUM_JOINTS) + 3 * joint
            ray = rays_ptr + 3 * (frame * NUM_JOINTS + joint)
            slope = slopes_ptr + 3 * (frame * NUM_JOINTS + joint)
            z = tl.load(at + 2, mask=mask, other=0.0)
            x = tl.load(ray, mask=mask, other=0.0) * z - tl.load(at, mask=mask, other=0.0)
            y = tl.load(ray + 1, mask=mask, other=0.0) * z - tl.load(at + 1, mask=mask, other=0.0)
            weight = tl.load(ray + 2, mask=mask, other=0.0)
            sum_x += weight * x
            sum_y += weight * y
            depth -= tl.load(slope, mask=mask, other=0.0) * x + tl.load(slope + 1, mask=mask, other=0.0) * y
        kept = frames_ptr + 8 * frame
        inverse, ratio = tl.load(kept + 2), tl.load(kept + 3)
        root_z = _in_row(depth, ROWS, LANES)
        root_x = _in_row(sum_x, ROWS, LANES) * inverse + tl.load(kept) * root_z
        root_y = _in_row(sum_y, ROWS, LANES) * inverse + tl.load(kept + 1) * root_z
        distance = zeros
        for block in tl.static_range(blocks):
            joint = block * LANES + lane
            mask = joint < NUM_JOINTS
            at = poses + row * (3 * NUM_JOINTS) + 3 * joint
            ray = rays_ptr + 3 * (frame * NUM_JOINTS + joint)
            off_x, off_y, z = _off(
                tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0),
                tl.load(at + 2, mask=mask, other=0.0), root_x, root_y, root_z,
                tl.load(ray, mask=mask, other=0.0), tl.load(ray + 1, mask=mask, other=0.0),
            )  # fmt: skip
            off_y *= ratio
            # Behind the camera there is no image.
            far = tl.where(z > 1e-3, tl.sqrt(off_x * off_x + off_y * off_y) / z, float("inf"))
            weight = tl.load(ray + 2, mask=mask, other=0.0)
            distance += tl.where(weight > 0.0, far * weight, 0.0)
        cost = _in_row(distance, ROWS, LANES) * tl.load(kept + 4)
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
def _weigh(roots_ptr, weights_ptr, frames_ptr, here, num_hypotheses, FRAME_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr):
    """Write e^-cost over their sum, all alike where no hypothesis can be placed; keep the roots' weighted depths."""
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
    depth = tl.zeros((FRAME_BLOCK,), tl.float32)
    for begin in range(0, num_hypotheses, BLOCK_H):
        hypothesis = begin + tl.arange(0, BLOCK_H)[:, None]
        there = real & (hypothesis < num_hypotheses)
        root = roots_ptr + 4 * (start + hypothesis)
        cost = tl.load(root + 3, mask=there, other=infinity)
        likelihood = tl.exp(lowest[None, :] - tl.where(cost < infinity, cost, infinity))
        weight = tl.div_rn(tl.where(nowhere, 1.0, likelihood), total[None, :] + tl.zeros_like(cost))
        tl.store(weights_ptr + start + hypothesis, weight, mask=there)
        x, y = tl.load(root, mask=there, other=0.0), tl.load(root + 1, mask=there, other=0.0)
        z = tl.load(root + 2, mask=there, other=0.0)
        depth += tl.sum(tl.where(there & _is_finite(x) & _is_finite(y) & _is_finite(z), weight * z, 0.0), axis=0)
    tl.store(frames_ptr + 8 * frame + 5, depth, mask=frame < here)


@triton.jit
def _refine(
    frames_ptr, rays_ptr, sums_ptr, weighted_mean_ptr, way, here, stride,
    NUM_JOINTS: tl.constexpr, FRAME_BLOCK: tl.constexpr, JOINT_BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted mean of the moved poses, of sums of what moves with a joint's share of the way and what does not."""
    frame, joint = tl.arange(0, FRAME_BLOCK), tl.arange(0, JOINT_BLOCK)
    mask = (frame < here)[None, :] & (joint < NUM_JOINTS)[:, None]
    at = frame[None, :] * NUM_JOINTS + joint[:, None]
    u = tl.load(rays_ptr + 3 * at, mask=mask, other=0.0)
    v = tl.load(rays_ptr + 3 * at + 1, mask=mask, other=0.0)
    weight = tl.load(rays_ptr + 3 * at + 2, mask=mask, other=0.0)
    present = weight > 0.0
    # Which part of the way to its ray a joint goes: S / (S + R), where that has a value.
    offset = tl.load(sums_ptr + at, mask=mask, other=0.0)
    variance = tl.load(sums_ptr + stride + at, mask=mask, other=0.0)
    usual, some, _ = tl.reduce((tl.where(present, offset, 0.0), present.to(tl.float32), offset), 0, _add_three)
    usual = (usual / some)[None, :] + tl.zeros_like(offset)
    share = tl.div_rn(variance, variance + tl.where(offset > usual, offset, usual))
    share = tl.where(_is_finite(share), share, 0.0) * (way * tl.minimum(weight, 1.0))
    depth = tl.load(sums_ptr + 2 * stride + at, mask=mask, other=0.0)
    far = depth + tl.load(frames_ptr + 8 * frame + 5, mask=frame < here, other=0.0)[None, :]
    # No hypothesis of the frame is placed where a ray is no number.
    u, v = tl.where(_is_finite(u), u, 0.0), tl.where(_is_finite(v), v, 0.0)
    x = u * far + (1.0 - share) * tl.load(sums_ptr + 3 * stride + at, mask=mask, other=0.0)
    y = v * far + (1.0 - share) * tl.load(sums_ptr + 4 * stride + at, mask=mask, other=0.0)
    is_root = (joint == 0)[:, None]
    of_root = tl.where(is_root, x, 0.0), tl.where(is_root, y, 0.0), tl.where(is_root, depth, 0.0)
    root_x, root_y, root_z = tl.reduce(of_root, 0, _add_three)
    x = x - root_x[None, :] + tl.load(sums_ptr + 5 * stride + at, mask=mask, other=0.0)
    y = y - root_y[None, :] + tl.load(sums_ptr + 6 * stride + at, mask=mask, other=0.0)
    z = depth - root_z[None, :] + tl.load(sums_ptr + 7 * stride + at, mask=mask, other=0.0)
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
    frames_ptr,  # [B, 8], of use in here alone; as is
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
    FEW: tl.constexpr,
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
    weighted_mean_ptr += first * (3 * NUM_JOINTS)
    covariance_ptr += first * (9 * NUM_JOINTS)
    # One number of every 32 bytes: all of it is on its way before the first of it is used.
    sector = 8 * tl.arange(0, SECTORS)
    ahead = tl.load(poses + sector, mask=sector < here * num_hypotheses * (3 * NUM_JOINTS), other=0.0)
    # Until the results come, rays lie where the mean does, and slopes where the weighted mean does.
    _look(
        keypoints_ptr, confidence_ptr, camera, frames_ptr, mean_ptr, weighted_mean_ptr, temperature, here,
        NUM_JOINTS, SHARED_CAMERA, FRAME_BLOCK, JOINT_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    _place(
        poses, frames_ptr, mean_ptr, weighted_mean_ptr, roots_ptr, here, num_hypotheses,
        NUM_JOINTS, FRAMES, ROWS, LANES,
    )  # fmt: skip
    tl.debug_barrier()
    _weigh(roots_ptr, weights_ptr, frames_ptr, here, num_hypotheses, FRAME_BLOCK, WEIGHTS_H)
    tl.debug_barrier()

    thread = tl.arange(0, PARTS * BLOCK)
    item, part = thread % BLOCK, thread // BLOCK
    mask = item < here * NUM_JOINTS
    frame = tl.where(mask, item // NUM_JOINTS, 0)
    own = poses + frame.to(tl.int64) * num_hypotheses * (3 * NUM_JOINTS) + 3 * (item % NUM_JOINTS)
    u = tl.load(mean_ptr + 3 * item, mask=mask, other=0.0)
    v = tl.load(mean_ptr + 3 * item + 1, mask=mask, other=0.0)
    roots, weights = roots_ptr + 4 * num_hypotheses * frame, weights_ptr + num_hypotheses * frame
    shift_x, shift_y, shift_z = shift_of(own, mask, num_hypotheses, 3 * NUM_JOINTS, FEW)
    zeros = tl.zeros_like(shift_x)
    sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    seen_x, seen_y, seen_square = zeros, zeros, zeros
    depth, side_x, side_y = zeros, zeros, zeros
    free_x, free_y, free_z = zeros, zeros, zeros
    for begin in range(0, num_hypotheses, PARTS * AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            hypothesis = hypothesis_of(begin, part, i, PARTS)
            there = mask & (hypothesis < num_hypotheses)
            at = own + hypothesis * (3 * NUM_JOINTS)
            x = tl.load(at, mask=there, other=shift_x)
            y = tl.load(at + 1, mask=there, other=shift_y)
            z = tl.load(at + 2, mask=there, other=shift_z)
            sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = add_products(
                x - shift_x, y - shift_y, z - shift_z, sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz
            )
            root_x = tl.load(roots + 4 * hypothesis, mask=there, other=0.0)
            root_y = tl.load(roots + 4 * hypothesis + 1, mask=there, other=0.0)
            root_z = tl.load(roots + 4 * hypothesis + 2, mask=there, other=0.0)
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
            side_x += tl.where(placed, weight * off_x, 0.0)
            side_y += tl.where(placed, weight * off_y, 0.0)
            free_x += tl.where(placed, 0.0, weight * x)
            free_y += tl.where(placed, 0.0, weight * y)
            free_z += tl.where(placed, 0.0, weight * z)
    # From here on a thread for each item.
    sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz = join_nine(sum_x, sum_y, sum_z, xx, yy, zz, xy, xz, yz, PARTS)
    seen_x, seen_y, seen_square, depth, side_x, side_y, free_x, free_y, free_z = join_nine(
        seen_x, seen_y, seen_square, depth, side_x, side_y, free_x, free_y, free_z, PARTS
    )
    if PARTS > 1:
        item = tl.arange(0, BLOCK)
        mask = item < here * NUM_JOINTS
        frame = tl.where(mask, item // NUM_JOINTS, 0)
        own = poses + frame.to(tl.int64) * num_hypotheses * (3 * NUM_JOINTS) + 3 * (item % NUM_JOINTS)
        shift_x, shift_y, shift_z = shift_of(own, mask, num_hypotheses, 3 * NUM_JOINTS, FEW)
    share = 1.0 / num_hypotheses
    mean_x, mean_y = seen_x * share, seen_y * share
    offset = mean_x * mean_x + mean_y * mean_y
    variance = seen_square * share - offset
    # What is summed lies where the covariance comes at the end.
    sums, stride = covariance_ptr + item, here * NUM_JOINTS
    tl.store(sums, offset, mask=mask)
    tl.store(sums + stride, tl.where(variance < 0.0, 0.0, variance), mask=mask)  # NaN stays NaN
    tl.store(sums + 2 * stride, depth, mask=mask)
    tl.store(sums + 3 * stride, side_x, mask=mask)
    tl.store(sums + 4 * stride, side_y, mask=mask)
    tl.store(sums + 5 * stride, free_x, mask=mask)
    tl.store(sums + 6 * stride, free_y, mask=mask)
    tl.store(sums + 7 * stride, free_z, mask=mask)
    tl.debug_barrier()
    _refine(
        frames_ptr, mean_ptr, covariance_ptr, weighted_mean_ptr, way, here, stride, NUM_JOINTS, FRAME_BLOCK, JOINT_BLOCK
    )  # fmt: skip
    tl.debug_barrier()
    store_moments(
        mean_ptr + 3 * item, covariance_ptr + 9 * item, mask, shift_x, shift_y, shift_z, sum_x, sum_y, sum_z,
        xx, yy, zz, xy, xz, yz, num_hypotheses, ENOUGH,
    )  # fmt: skip
    # Kept, so that it is read at all.
    tl.store(frames_ptr + 7, tl.sum(ahead, axis=0))
