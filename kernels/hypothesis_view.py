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

from diffupose.kernels.hypothesis_moments import add_nine, add_products, beside, moments_of, shift_of
from diffupose.kernels.hypothesis_placement import add_three, add_two, look, place, prefetch, project, read


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _for_parts(sums, like):
    """Return for each of the PARTS what some ``[FRAMES, LANES]`` are."""
    repeated = ()
    for i in tl.static_range(len(sums)):
        repeated = repeated + (tl.broadcast_to(sums[i][:, None, :], like.shape),)
    return repeated


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
        x, y = read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS), read(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = read(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
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
        joined = joined + (_for_parts(tl.reduce(sums[block], 1, add_three), zero),)
    return joined, _of_root(_for_parts(tl.reduce(base, 1, add_three), zero))


@triton.jit
def _of_root(values):
    """Return what three values of the first joints are for joint 0."""
    is_root = tl.arange(0, values[0].shape[2])[None, None, :] == 0
    first = (tl.where(is_root, values[0], 0.0), tl.where(is_root, values[1], 0.0), tl.where(is_root, values[2], 0.0))
    x, y, z = tl.reduce(first, 2, add_three)
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
    AHEAD: tl.constexpr,  # of so many hypotheses after the present one memory is asked for; 0: of none
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
    start = hypotheses_ptr + frame * (num_hypotheses * numel) + 3 * lane
    rounds = tl.cdiv(num_hypotheses, PARTS)
    if AHEAD > 0:
        for i in tl.static_range(AHEAD):
            prefetch(start + tl.minimum(part * rounds + i, num_hypotheses - 1) * numel, lane, NUM_JOINTS, LANES)
        for i in tl.static_range(1, FEW):
            prefetch(start + i * (num_hypotheses // FEW) * numel, lane, NUM_JOINTS, LANES)
    rays, mean_u, mean_v, ratio, scale = look(
        keypoints_ptr + 2 * NUM_JOINTS * frame, confidence_ptr + NUM_JOINTS * frame,
        cameras + (0 if SHARED_CAMERA else 9) * frame, lane, temperature, NUM_JOINTS, LANES, BLOCKS,
    )  # fmt: skip
    weights = weights_ptr + frame * num_hypotheses
    writes = (index < here) & (lane == 0)

    zero = tl.zeros(shape, tl.float32)
    pose = start + tl.minimum(part * rounds, num_hypotheses - 1) * numel
    x = read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
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
        if AHEAD > 0:
            # At the end of the last frame there is nothing to ask for.
            ahead = tl.where(hypothesis + AHEAD < num_hypotheses, AHEAD * numel, 0)
            prefetch(pose + ahead, lane, NUM_JOINTS, LANES)
        y = read(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = read(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
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
        root_x, root_y, root_z, miss_x, miss_y = place(x, y, z, rays, BLOCKS)
        # The next one comes from memory while the rest of this one is dealt with: with one axis come all that lie near.
        has_next = i + 1 < rounds if WHOLE else (i + 1 < rounds) & (hypothesis + 1 < num_hypotheses)
        pose += tl.where(has_next, numel, 0)
        x = read(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
        cost, seen_x, seen_y = project(
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
        seen_x, seen_y, square = _for_parts(tl.reduce(seen[block], 1, add_three), zero)
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
    usual, number = tl.reduce((usual, number), 2, add_two)
    usual = (usual / number)[:, :, None]
    base, refined = (zero, zero, zero), ()
    for block in tl.static_range(BLOCKS):
        sums = weighted[block]
        near_x, near_y, depth = _for_parts(
            tl.reduce((sums[0] * change, sums[1] * change, sums[2] * change), 1, add_three), zero
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
        sums, shift = tl.reduce(moments[block], 1, add_nine), shifts[block]
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
