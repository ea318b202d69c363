"""Mean, covariance, reprojection weights and weighted mean of hypotheses in Triton.

The formulas stand in ``diffupose/reference/hypothesis_statistics.py``. All of it is one pass over the hypotheses: each
is placed and weighs as much as it fits among those before it; what was summed before is scaled when one comes that fits
better (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

Tensors are ``[FRAMES, PARTS, LANES]``: LANES threads share a pose's joints, of which each has BLOCKS, LANES apart, in
tuples; PARTS of them share a frame's hypotheses. So rays, sums and poses lie in registers, and none is read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffupose.kernels.hypothesis_moments import add_products, beside, moments_of, shift_of


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


# Several reductions at once, as threads wait for each other in each of them.
@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add_nine(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def _add_and_nearer(a0, a1, b0, b1):
    return a0 + b0, tl.minimum(a1, b1)


@triton.jit
def _larger_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _for_parts(sums, like):
    """Return for each of the PARTS what some ``[FRAMES, LANES]`` are."""
    repeated = ()
    for i in tl.static_range(len(sums)):
        repeated = repeated + (tl.broadcast_to(sums[i][:, None, :], like.shape),)
    return repeated


@triton.jit
def _read(pose, lane, AXIS: tl.constexpr, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr):
    """Return an axis of a thread's joints of a hypothesis, 0 where there is none."""
    values = ()
    for block in tl.static_range(BLOCKS):
        at = pose + (3 * LANES * block + AXIS)
        if (block + 1) * LANES > NUM_JOINTS:
            values = values + (tl.load(at, mask=lane < NUM_JOINTS - block * LANES, other=0.0),)
        else:
            values = values + (tl.load(at),)
    return values


@triton.jit
def _look(keypoints, confidences, camera, lane, temperature, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    """Return what all hypotheses of a frame share.

    Of a joint its ray u, v, 0 where it is missing, by how much misses of its ray change the depth, and its share of the
    confidences. Of a frame the mean ray, fy / fx, and what makes costs of errors in units of fx.
    """
    nowhere = tl.full(lane.shape, -float("inf"), tl.float32)
    right, left, bottom, top = nowhere, nowhere, nowhere, nowhere
    x, y, confidence = (), (), ()
    for block in tl.static_range(BLOCKS):
        joint = block * LANES + lane
        mask = joint < NUM_JOINTS
        weight = tl.load(confidences + joint, mask=mask, other=0.0).to(tl.float32)
        own_x = tl.load(keypoints + 2 * joint, mask=mask, other=0.0)
        own_y = tl.load(keypoints + 2 * joint + 1, mask=mask, other=0.0)
        near_x, near_y, present = own_x.to(tl.float32), own_y.to(tl.float32), weight > 0.0
        right = tl.maximum(right, tl.where(present, near_x, nowhere))
        left = tl.maximum(left, tl.where(present, -near_x, nowhere))
        bottom = tl.maximum(bottom, tl.where(present, near_y, nowhere))
        top = tl.maximum(top, tl.where(present, -near_y, nowhere))
        x, y, confidence = x + (own_x,), y + (own_y,), confidence + (weight,)
    right, left, bottom, top = tl.reduce((right, left, bottom, top), 2, _larger_four)
    side = tl.maximum(right + left, bottom + top)[:, :, None]
    corner_x, corner_y = -left[:, :, None], -top[:, :, None]
    # Rays that are nearly parallel differ in their last digits: so pixels are taken off each other before all else.
    total, mean_x, mean_y = tl.zeros_like(nowhere), tl.zeros_like(nowhere), tl.zeros_like(nowhere)
    from_x, from_y = (), ()
    for block in tl.static_range(BLOCKS):
        present = confidence[block] > 0.0
        own_x = tl.where(present, (x[block] - corner_x).to(tl.float32), 0.0)
        own_y = tl.where(present, (y[block] - corner_y).to(tl.float32), 0.0)
        total += confidence[block]
        mean_x, mean_y = mean_x + confidence[block] * own_x, mean_y + confidence[block] * own_y
        from_x, from_y = from_x + (own_x,), from_y + (own_y,)
    total, mean_x, mean_y = tl.reduce((total, mean_x, mean_y), 2, _add_three)
    inverse = (1.0 / total)[:, :, None]
    mean_x, mean_y = mean_x[:, :, None] * inverse, mean_y[:, :, None] * inverse
    # Once more: by what the rounded mean is off, a confidence far above the others would weigh.
    rest_x, rest_y = tl.zeros_like(nowhere), tl.zeros_like(nowhere)
    off_x, off_y = (), ()
    for block in tl.static_range(BLOCKS):
        own_x, own_y = from_x[block] - mean_x, from_y[block] - mean_y
        rest_x, rest_y = rest_x + confidence[block] * own_x, rest_y + confidence[block] * own_y
        off_x, off_y = off_x + (own_x,), off_y + (own_y,)
    rest_x, rest_y = tl.reduce((rest_x, rest_y), 2, _add_two)
    rest_x, rest_y = rest_x[:, :, None] * inverse, rest_y[:, :, None] * inverse
    mean_x, mean_y = mean_x + rest_x, mean_y + rest_y
    fx, fy = tl.load(camera).to(tl.float32), tl.load(camera + 4).to(tl.float32)
    cx, cy = tl.load(camera + 2), tl.load(camera + 5)
    per_fx, per_fy = 1.0 / fx, 1.0 / fy
    u, v, off_u, off_v, spread = (), (), (), (), tl.zeros_like(nowhere)
    for block in tl.static_range(BLOCKS):
        present = confidence[block] > 0.0
        own_u, own_v = (off_x[block] - rest_x) * per_fx, (off_y[block] - rest_y) * per_fy
        spread += confidence[block] * (own_u * own_u + own_v * own_v)
        u = u + (tl.where(present, (x[block] - cx).to(tl.float32) * per_fx, 0.0),)
        v = v + (tl.where(present, (y[block] - cy).to(tl.float32) * per_fy, 0.0),)
        off_u, off_v = off_u + (own_u,), off_v + (own_v,)
    spread = tl.sum(spread, axis=2)[:, :, None]
    mean_u = ((corner_x - cx).to(tl.float32) + mean_x) * per_fx
    mean_v = ((corner_y - cy).to(tl.float32) + mean_y) * per_fy
    # NaN where all rays coincide, and what is multiplied by it.
    per_spread = tl.where(spread * inverse > 1e-20, -1.0 / spread, float("nan"))
    shares, slope_u, slope_v = (), (), ()
    for block in tl.static_range(BLOCKS):
        slope = confidence[block] * per_spread
        slope_u, slope_v = slope_u + (slope * off_u[block],), slope_v + (slope * off_v[block],)
        shares = shares + (confidence[block] * inverse,)
    scale = tl.abs(fx) * 1.4426950408889634 / (tl.maximum(side, 2e-6) * temperature)  # of powers of two
    return (u, v, slope_u, slope_v, shares), mean_u, mean_v, fy * per_fx, scale


@triton.jit
def _place(x, y, z, rays, BLOCKS: tl.constexpr):
    """Return a hypothesis' root, and how far its joints lie from their rays where the root is 0.

    The root by weighted linear least squares, NaN where it is free: t_x - u t_z = u Z - X, and the same for y. It is
    kept as its depth and how far it lies off the mean ray there, which is of a body's size: sums of it lose no digits.
    """
    u, v, slope_u, slope_v, share = rays
    miss_x, miss_y, zero = (), (), tl.zeros_like(x[0])
    sum_x, sum_y, depth = zero, zero, zero
    for block in tl.static_range(BLOCKS):
        to_x, to_y = u[block] * z[block] - x[block], v[block] * z[block] - y[block]
        sum_x, sum_y = sum_x + share[block] * to_x, sum_y + share[block] * to_y
        depth += slope_u[block] * to_x + slope_v[block] * to_y
        miss_x, miss_y = miss_x + (to_x,), miss_y + (to_y,)
    sum_x, sum_y, depth = tl.reduce((sum_x, sum_y, depth), 2, _add_three)
    return sum_x[:, :, None], sum_y[:, :, None], depth[:, :, None], miss_x, miss_y


@triton.jit
def _signed(size, sign):
    """Return ``size`` with the sign of ``sign``; both are float32."""
    bits = (sign.to(tl.int32, bitcast=True) & -0x80000000) | (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _project(root_x, root_y, root_z, miss_x, miss_y, z, rays, ratio, scale, BLOCKS: tl.constexpr):
    """Return a placed hypothesis' cost, and where its joints are seen off their keypoints, in focal lengths.

    The cost is the weighted mean distance from the keypoints, in box sides and temperatures; infinite where there is no
    image, NaN where there is no root.
    """
    u, v, _, _, share = rays
    seen_x, seen_y, cost = (), (), tl.zeros_like(root_x)
    nearest = cost + float("inf")
    for block in tl.static_range(BLOCKS):
        far = tl.where(share[block] > 0.0, z[block] + root_z, 1.0)
        per_root = tl.rsqrt(tl.abs(far))
        per_far = _signed(per_root * per_root, far)  # in fewer instructions than a quotient
        # As a difference of metres, divided by the depth, it loses no digits.
        at_x = (root_x - miss_x[block] - u[block] * root_z) * per_far
        at_y = (root_y - miss_y[block] - v[block] * root_z) * per_far
        in_fx = ratio * at_y
        cost += share[block] * tl.sqrt(at_x * at_x + in_fx * in_fx)
        nearest = tl.minimum(nearest, far)
        seen_x, seen_y = seen_x + (at_x,), seen_y + (at_y,)
    cost, nearest = tl.reduce((cost, nearest), 2, _add_and_nearer)
    cost, nearest = cost[:, :, None] * scale, nearest[:, :, None]
    # Behind the camera there is no image. No number times 0 is no number.
    cost = tl.where(nearest > 1e-3, cost, float("inf")) + (root_x + root_y + root_z) * 0.0
    return cost, seen_x, seen_y


@triton.jit
def _likelihood(cost, least):
    """Return 2^-cost as a part of that of the lowest cost; 1 where no hypothesis has a cost."""
    return tl.where(least == float("inf"), 1.0, tl.exp2(least - tl.where(cost < float("inf"), cost, float("inf"))))


@triton.jit
def _sum_apart(pose, weights, least, part, lane, num_hypotheses, NUM_JOINTS: tl.constexpr, PARTS: tl.constexpr,
               LANES: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Return the sums over hypotheses of likelihoods times poses, and of the joint 0 of those that have a root.

    A part's last hypothesis is at ``pose``, where the first pass over them has ended.
    """
    zero = tl.zeros_like(least)
    sums, base = (), (zero, zero, zero)
    for _ in tl.static_range(BLOCKS):
        sums = sums + ((zero, zero, zero),)
    rounds = tl.cdiv(num_hypotheses, PARTS)
    for i in range(rounds):
        hypothesis = part * rounds + (rounds - 1 - i)
        there = hypothesis < num_hypotheses
        cost = tl.load(weights + hypothesis, mask=there, other=0.0)
        x, y = _read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS), _read(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = _read(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
        pose -= tl.where(there & (i + 1 < rounds), 3 * NUM_JOINTS, 0)
        likelihood, placed, before = _likelihood(cost, least), there & (cost == cost), sums
        sums = ()
        for block in tl.static_range(BLOCKS):
            of_x, of_y, of_z = likelihood * x[block], likelihood * y[block], likelihood * z[block]
            sums = sums + (
                (
                    before[block][0] + tl.where(there, of_x, 0.0),
                    before[block][1] + tl.where(there, of_y, 0.0),
                    before[block][2] + tl.where(there, of_z, 0.0),
                ),
            )
            if block == 0:
                base = (
                    base[0] + tl.where(placed, of_x, 0.0),
                    base[1] + tl.where(placed, of_y, 0.0),
                    base[2] + tl.where(placed, of_z, 0.0),
                )
    joined = ()
    for block in tl.static_range(BLOCKS):
        joined = joined + (_for_parts(tl.reduce(sums[block], 1, _add_three), zero),)
    return joined, _of_root(_for_parts(tl.reduce(base, 1, _add_three), zero))


@triton.jit
def _of_root(values):
    """Return what three values of the first joints are for joint 0."""
    is_root = tl.arange(0, values[0].shape[2])[None, None, :] == 0
    first = (tl.where(is_root, values[0], 0.0), tl.where(is_root, values[1], 0.0), tl.where(is_root, values[2], 0.0))
    x, y, z = tl.reduce(first, 2, _add_three)
    shape: tl.constexpr = values[0].shape
    x, y, z = (
        tl.broadcast_to(x[:, :, None], shape),
        tl.broadcast_to(y[:, :, None], shape),
        (tl.broadcast_to(z[:, :, None], shape)),
    )
    return x, y, z


@triton.jit
def _four(a, b, c, d):
    """Return ``[FRAMES LANES, 4]`` of four ``[FRAMES, LANES]``."""
    return beside(tl.ravel(a), tl.ravel(b), tl.ravel(c), tl.ravel(d))


@triton.jit
def _once(values):
    """Return of ``[FRAMES, PARTS, LANES]`` that agree for all parts ``[FRAMES, LANES]``."""
    return tl.max(values, axis=1)


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
    way,  # to its ray, the part of it that a joint goes at most
    temperature,
    num_frames,
    num_hypotheses,
    SHARED_CAMERA: tl.constexpr,
    ENOUGH: tl.constexpr,
    WHOLE: tl.constexpr,  # whether PARTS divide the hypotheses
    NUM_JOINTS: tl.constexpr,
    FEW: tl.constexpr,
    FRAMES: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """FRAMES frames; of the last program the last ones may be the same one, so that no read need be masked."""
    numel: tl.constexpr = 3 * NUM_JOINTS
    infinity = float("inf")
    first = tl.program_id(0).to(tl.int64) * FRAMES
    here = tl.minimum(num_frames - first, FRAMES).to(tl.int32)
    hypotheses_ptr += first * num_hypotheses * numel
    keypoints_ptr += first * (2 * NUM_JOINTS)
    confidence_ptr += first * NUM_JOINTS
    cameras = intrinsics_ptr if SHARED_CAMERA else intrinsics_ptr + 9 * first
    weights_ptr += first * num_hypotheses
    mean_ptr += first * numel
    weighted_mean_ptr += first * numel
    covariance_ptr += first * (9 * NUM_JOINTS)

    # All of one shape from the start, or else what is shared lies elsewhere than what it is used with.
    shape: tl.constexpr = [FRAMES, PARTS, LANES]
    index = tl.broadcast_to(tl.arange(0, FRAMES)[:, None, None], shape)
    part = tl.broadcast_to(tl.arange(0, PARTS)[None, :, None], shape)
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, None, :], shape)
    frame = tl.minimum(index, here - 1)
    rays, mean_u, mean_v, ratio, scale = _look(
        keypoints_ptr + 2 * NUM_JOINTS * frame, confidence_ptr + NUM_JOINTS * frame,
        cameras + (0 if SHARED_CAMERA else 9) * frame, lane, temperature, NUM_JOINTS, LANES, BLOCKS,
    )  # fmt: skip
    start = hypotheses_ptr + frame * (num_hypotheses * numel) + 3 * lane
    weights = weights_ptr + frame * num_hypotheses
    writes = (index < here) & (lane == 0)

    zero = tl.zeros(shape, tl.float32)
    rounds = tl.cdiv(num_hypotheses, PARTS)
    pose = start + tl.minimum(part * rounds, num_hypotheses - 1) * numel
    x = _read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
    shifts, moments, seen, weighted = (), (), (), ()
    for block in tl.static_range(BLOCKS):
        own, is_joint = start + 3 * LANES * block, block * LANES + lane < NUM_JOINTS
        shifts = shifts + (shift_of(own, is_joint, num_hypotheses, numel, FEW),)
        moments = moments + ((zero, zero, zero, zero, zero, zero, zero, zero, zero),)
        seen, weighted = seen + ((zero, zero, zero),), weighted + ((zero, zero, zero),)
    lowest, total = zero + infinity, zero
    sum_x, sum_y, sum_z = zero, zero, zero
    for i in range(rounds):
        hypothesis = part * rounds + i
        there = hypothesis < num_hypotheses
        y = _read(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = _read(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
        before = moments
        moments = ()
        for block in tl.static_range(BLOCKS):
            off_x, off_y, off_z = x[block] - shifts[block][0], y[block] - shifts[block][1], z[block] - shifts[block][2]
            if not WHOLE:
                off_x, off_y = tl.where(there, off_x, 0.0), tl.where(there, off_y, 0.0)
                off_z = tl.where(there, off_z, 0.0)
            sums = before[block]
            moments = moments + (
                add_products(
                    off_x, off_y, off_z, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], sums[8]
                ),
            )
        root_x, root_y, root_z, miss_x, miss_y = _place(x, y, z, rays, BLOCKS)
        # The next one comes from memory while the rest of this one is dealt with: with one axis come all that lie near.
        has_next = i + 1 < rounds if WHOLE else (i + 1 < rounds) & (hypothesis + 1 < num_hypotheses)
        pose += tl.where(has_next, numel, 0)
        x = _read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
        cost, seen_x, seen_y = _project(
            root_x + mean_u * root_z, root_y + mean_v * root_z, root_z, miss_x, miss_y, z, rays, ratio, scale,
            BLOCKS,
        )  # fmt: skip
        tl.store(weights + hypothesis, cost, mask=writes if WHOLE else writes & there)
        # Of the lowest cost and this one either is a part of the other.
        cost = tl.where(cost < infinity, cost, infinity)
        lesser = tl.where(cost == lowest, 1.0, tl.exp2(-tl.abs(cost - lowest)))
        change, likelihood = tl.where(cost < lowest, lesser, 1.0), tl.where(cost < lowest, 1.0, lesser)
        lowest = tl.minimum(lowest, cost)
        if not WHOLE:
            likelihood = tl.where(there, likelihood, 0.0)
        # What has no root makes these no number, and is dealt with at the end.
        total = total * change + likelihood
        sum_x, sum_y = sum_x * change + likelihood * root_x, sum_y * change + likelihood * root_y
        sum_z = sum_z * change + likelihood * root_z
        seen_before, weighted_before = seen, weighted
        seen, weighted = (), ()
        for block in tl.static_range(BLOCKS):
            at_x, at_y = seen_x[block], seen_y[block]
            if not WHOLE:
                at_x, at_y = tl.where(there, at_x, 0.0), tl.where(there, at_y, 0.0)
            sums = seen_before[block]
            seen = seen + ((sums[0] + at_x, sums[1] + at_y, sums[2] + at_x * at_x + at_y * at_y),)
            sums = weighted_before[block]
            weighted = weighted + (
                (
                    sums[0] * change + likelihood * miss_x[block],
                    sums[1] * change + likelihood * miss_y[block],
                    sums[2] * change + likelihood * z[block],
                ),
            )

    # Over PARTS, all of which get the sums.
    least = tl.min(lowest, axis=1)[:, None, :] + zero
    change = tl.where(lowest == least, 1.0, tl.exp2(least - lowest))
    joined = tl.reduce((total * change, sum_x * change, sum_y * change, sum_z * change), 1, _add_four)
    total, sum_x, sum_y, sum_z = _for_parts(joined, zero)
    lost = tl.where(_is_finite(sum_x + sum_y + sum_z), 0.0, 1.0)
    # Which part of the way to its ray a joint goes: S / (S + R), where that has a value.
    share, per_total = 1.0 / num_hypotheses, 1.0 / total
    u, v, _, _, _ = rays
    confidence = ()
    offsets, spreads, usual, number = (), (), zero, zero
    for block in tl.static_range(BLOCKS):
        seen_x, seen_y, square = _for_parts(tl.reduce(seen[block], 1, _add_three), zero)
        mean_x, mean_y = seen_x * share, seen_y * share
        offset = mean_x * mean_x + mean_y * mean_y
        spread = square * share - offset
        joint = block * LANES + lane
        # Read again: of what the loop holds in registers there can be no more.
        weight = tl.load(confidence_ptr + (NUM_JOINTS * frame + joint), mask=joint < NUM_JOINTS, other=0.0)
        weight = weight.to(tl.float32)
        present, confidence = weight > 0.0, confidence + (tl.minimum(weight, 1.0),)
        usual += tl.where(present, offset, 0.0)
        number += tl.where(present, 1.0, 0.0)
        offsets, spreads = offsets + (offset,), spreads + (tl.where(spread < 0.0, 0.0, spread),)  # NaN stays NaN
    usual, number = tl.reduce((usual, number), 2, _add_two)
    usual = (usual / number)[:, :, None]
    base, refined = (zero, zero, zero), ()
    for block in tl.static_range(BLOCKS):
        sums = weighted[block]
        near_x, near_y, depth = _for_parts(
            tl.reduce((sums[0] * change, sums[1] * change, sums[2] * change), 1, _add_three), zero
        )
        trust = spreads[block] / (spreads[block] + tl.where(offsets[block] > usual, offsets[block], usual))
        trust = tl.where(_is_finite(trust), trust, 0.0) * (way * confidence[block])
        # Where the poses have the joint, and how far that is from its ray.
        joint_x, joint_y = u[block] * depth - near_x, v[block] * depth - near_y
        joint_x -= trust * (sum_x - near_x - (u[block] - mean_u) * sum_z)
        joint_y -= trust * (sum_y - near_y - (v[block] - mean_v) * sum_z)
        refined = refined + ((joint_x, joint_y, depth),)
        if block == 0:
            base = _of_root(refined[0])
    tl.debug_barrier()  # costs have been written
    if tl.max(lost) > 0.0:
        # What has no root is averaged as it is, and the frame's other hypotheses are not refined.
        apart, apart_base = _sum_apart(
            pose, weights, least, part, lane, num_hypotheses, NUM_JOINTS, PARTS, LANES, BLOCKS
        )
        is_lost = lost > 0.0
        base = (
            tl.where(is_lost, apart_base[0], base[0]), tl.where(is_lost, apart_base[1], base[1]),
            tl.where(is_lost, apart_base[2], base[2]),
        )  # fmt: skip
        fast = refined
        refined = ()
        for block in tl.static_range(BLOCKS):
            refined = refined + (
                (
                    tl.where(is_lost, apart[block][0], fast[block][0]),
                    tl.where(is_lost, apart[block][1], fast[block][1]),
                    tl.where(is_lost, apart[block][2], fast[block][2]),
                ),
            )
        tl.debug_barrier()  # costs have been read
    for begin in range(0, num_hypotheses, PARTS * LANES):
        hypothesis = begin + part * LANES + lane
        there = (index < here) & (hypothesis < num_hypotheses)
        likelihood = _likelihood(tl.load(weights + hypothesis, mask=there, other=0.0), least)
        tl.store(weights + hypothesis, likelihood * per_total, mask=there)

    # What a joint has, beside each other, as a store of one number in nine costs as much as all nine:
    # xx xy xz xy | yy yz xz yz | zz and the mean | the weighted mean.
    row, column = tl.arange(0, FRAMES * LANES)[:, None], tl.arange(0, 16)[None, :]
    stride = tl.where(column < 9, 9, 3)
    to = tl.where(column < 9, covariance_ptr + column, mean_ptr + (column - 9))
    to = tl.where(column < 12, to, weighted_mean_ptr + (column - 12))
    item, in_frame = row // LANES * NUM_JOINTS + row % LANES, row // LANES < here
    for block in tl.static_range(BLOCKS):
        sums, shift = tl.reduce(moments[block], 1, _add_nine), shifts[block]
        x, y, z, xx, yy, zz, xy, xz, yz = moments_of(
            _once(shift[0]), _once(shift[1]), _once(shift[2]), sums[0], sums[1], sums[2], sums[3], sums[4], sums[5],
            sums[6], sums[7], sums[8], num_hypotheses, ENOUGH,
        )  # fmt: skip
        moved_x = _once((refined[block][0] - base[0]) * per_total)
        moved_y = _once((refined[block][1] - base[1]) * per_total)
        moved_z = _once((refined[block][2] - base[2]) * per_total)
        results = beside(
            _four(xx, yy, zz, moved_x), _four(xy, yz, x, moved_y), _four(xz, xz, y, moved_z), _four(xy, yz, z, z)
        )
        there = in_frame & (column < 15)
        if (block + 1) * LANES > NUM_JOINTS:
            there &= block * LANES + row % LANES < NUM_JOINTS
        tl.store(to + block * LANES * stride + item * stride, results, mask=there)
