"""Mean, covariance, reprojection weights and weighted mean of hypotheses in Triton.

The formulas are in ``diffupose/reference/hypothesis_statistics.py``. One pass over the hypotheses computes everything.
Each hypothesis is placed and weighted relative to the lowest cost so far; a lower cost rescales the earlier sums
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).

Tensors are ``[FRAMES, PARTS, LANES]``. The LANES threads of a pose share its joints: each has BLOCKS joints, LANES
apart, as a tuple. The PARTS of a frame share its hypotheses. So rays, sums and poses stay in registers, and nothing is
read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffupose.kernels import _tuples
from diffupose.kernels.hypothesis_moments import add_to_sums, moments_of, rough_mean, stack_columns
from diffupose.kernels.hypothesis_placement import fit_root, load_axis, prefetch, reprojection_cost, viewing_rays


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _broadcast_to_parts(sums, like):
    """Return a tuple of ``[FRAMES, LANES]`` with the axis PARTS."""
    repeated = ()
    for i in tl.static_range(len(sums)):
        repeated = repeated + (tl.broadcast_to(sums[i][:, None, :], like.shape),)
    return repeated


@triton.jit
def _broadcast_root(values):
    """Return the values of joint 0, given those of every lane's first joint, for all lanes."""
    is_root = tl.arange(0, values[0].shape[2])[None, None, :] == 0
    first = tl.reduce(_tuples.zero_unless(is_root, values), 2, _tuples.add_three)
    shape: tl.constexpr = values[0].shape
    repeated = ()
    for i in tl.static_range(3):
        repeated = repeated + (tl.broadcast_to(first[i][:, :, None], shape),)
    return repeated


@triton.jit
def _first_part(values):
    """Return ``[FRAMES, LANES]`` from ``[FRAMES, PARTS, LANES]`` that are equal in all parts."""
    return tl.max(values, axis=1)


@triton.jit
def _stack_flat(a, b, c, d):
    """Return ``[FRAMES LANES, 4]`` from four ``[FRAMES, LANES]``."""
    return stack_columns(tl.ravel(a), tl.ravel(b), tl.ravel(c), tl.ravel(d))


@triton.jit
def _likelihood(cost, least):
    """Return 2^-cost relative to that of the lowest cost; 1 where no hypothesis has a cost."""
    return tl.where(least == float("inf"), 1.0, tl.exp2(least - tl.where(cost < float("inf"), cost, float("inf"))))


@triton.jit
def _sum_unrefined(pose, weights, least, part, lane, num_hypotheses, NUM_JOINTS: tl.constexpr, PARTS: tl.constexpr,
                   LANES: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Return the sums of likelihood times pose, and the same of joint 0 over the hypotheses that have a root.

    ``pose`` points to the part's last hypothesis, where the pass over the hypotheses has ended.
    """
    zero = tl.zeros_like(least)
    sums, base = ((zero, zero, zero),) * BLOCKS, (zero, zero, zero)
    rounds = tl.cdiv(num_hypotheses, PARTS)
    for i in range(rounds):
        hypothesis = part * rounds + (rounds - 1 - i)
        exists = hypothesis < num_hypotheses
        cost = tl.load(weights + hypothesis, mask=exists, other=0.0)
        x, y = load_axis(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS), load_axis(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = load_axis(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
        pose -= tl.where(exists & (i + 1 < rounds), 3 * NUM_JOINTS, 0)
        likelihood, has_root, before = _likelihood(cost, least), exists & (cost == cost), sums
        sums = ()
        for block in tl.static_range(BLOCKS):
            weighted = (likelihood * x[block], likelihood * y[block], likelihood * z[block])
            sums = sums + (_tuples.add_where(exists, before[block], weighted),)
            if block == 0:
                base = _tuples.add_where(has_root, base, weighted)
    total = ()
    for block in tl.static_range(BLOCKS):
        total = total + (_broadcast_to_parts(tl.reduce(sums[block], 1, _tuples.add_three), zero),)
    return total, _broadcast_root(_broadcast_to_parts(tl.reduce(base, 1, _tuples.add_three), zero))


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
    max_shift,  # the share of the way to its ray that a joint moves at most
    temperature,
    num_frames,
    num_hypotheses,
    SHARED_CAMERA: tl.constexpr,
    HAS_COVARIANCE: tl.constexpr,  # else it is NaN
    EVEN_PARTS: tl.constexpr,  # whether all parts have the same number of hypotheses
    NUM_JOINTS: tl.constexpr,
    SAMPLED: tl.constexpr,  # hypotheses that give the origin of the sums
    FRAMES: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFETCHED: tl.constexpr,  # hypotheses after the present one that are prefetched
):
    """Compute FRAMES frames. The last program repeats its last frame instead of masking its loads."""
    numel: tl.constexpr = 3 * NUM_JOINTS
    infinity = float("inf")
    first = tl.program_id(0).to(tl.int64) * FRAMES
    frames_here = tl.minimum(num_frames - first, FRAMES).to(tl.int32)
    hypotheses_ptr += first * num_hypotheses * numel
    keypoints_ptr += first * (2 * NUM_JOINTS)
    confidence_ptr += first * NUM_JOINTS
    cameras = intrinsics_ptr if SHARED_CAMERA else intrinsics_ptr + 9 * first
    weights_ptr += first * num_hypotheses
    mean_ptr += first * numel
    weighted_mean_ptr += first * numel
    covariance_ptr += first * (9 * NUM_JOINTS)

    # All tensors have one shape from the start. Otherwise the compiler gives shared values another layout.
    shape: tl.constexpr = [FRAMES, PARTS, LANES]
    index = tl.broadcast_to(tl.arange(0, FRAMES)[:, None, None], shape)
    part = tl.broadcast_to(tl.arange(0, PARTS)[None, :, None], shape)
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, None, :], shape)
    frame = tl.minimum(index, frames_here - 1)
    start = hypotheses_ptr + frame * (num_hypotheses * numel) + 3 * lane
    rounds = tl.cdiv(num_hypotheses, PARTS)
    if PREFETCHED > 0:
        for i in tl.static_range(PREFETCHED):
            prefetch(start + tl.minimum(part * rounds + i, num_hypotheses - 1) * numel, lane, NUM_JOINTS, LANES)
        for i in tl.static_range(1, SAMPLED):
            prefetch(start + i * (num_hypotheses // SAMPLED) * numel, lane, NUM_JOINTS, LANES)
    rays, mean_u, mean_v, ratio, scale = viewing_rays(
        keypoints_ptr + 2 * NUM_JOINTS * frame, confidence_ptr + NUM_JOINTS * frame,
        cameras + (0 if SHARED_CAMERA else 9) * frame, lane, temperature, NUM_JOINTS, LANES, BLOCKS,
    )  # fmt: skip
    weights = weights_ptr + frame * num_hypotheses
    writes = (index < frames_here) & (lane == 0)

    zero = tl.zeros(shape, tl.float32)
    pose = start + tl.minimum(part * rounds, num_hypotheses - 1) * numel
    x = load_axis(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
    origins = ()
    for block in tl.static_range(BLOCKS):
        own, is_joint = start + 3 * LANES * block, block * LANES + lane < NUM_JOINTS
        origins = origins + (rough_mean(own, is_joint, num_hypotheses, numel, SAMPLED),)
    moments, errors, weighted = ((zero,) * 9,) * BLOCKS, ((zero,) * 3,) * BLOCKS, ((zero,) * 3,) * BLOCKS
    lowest, total = zero + infinity, zero
    root_sums = (zero, zero, zero)
    for i in range(rounds):
        hypothesis = part * rounds + i
        exists = hypothesis < num_hypotheses
        if PREFETCHED > 0:
            # Past a frame's last hypothesis nothing new is prefetched: the last frame has nothing behind it.
            distance = tl.where(hypothesis + PREFETCHED < num_hypotheses, PREFETCHED * numel, 0)
            prefetch(pose + distance, lane, NUM_JOINTS, LANES)
        y = load_axis(pose, lane, 1, NUM_JOINTS, LANES, BLOCKS)
        z = load_axis(pose, lane, 2, NUM_JOINTS, LANES, BLOCKS)
        before = moments
        moments = ()
        for block in tl.static_range(BLOCKS):
            origin = origins[block]
            difference = (x[block] - origin[0], y[block] - origin[1], z[block] - origin[2])
            if not EVEN_PARTS:
                difference = _tuples.zero_unless(exists, difference)
            moments = moments + (add_to_sums(difference[0], difference[1], difference[2], before[block]),)
        root_x, root_y, root_z, miss_x, miss_y = fit_root(x, y, z, rays, BLOCKS)
        # The next hypothesis is loaded while this one is computed. One axis is enough: it brings the cache lines.
        has_next = i + 1 < rounds if EVEN_PARTS else (i + 1 < rounds) & (hypothesis + 1 < num_hypotheses)
        pose += tl.where(has_next, numel, 0)
        x = load_axis(pose, lane, 0, NUM_JOINTS, LANES, BLOCKS)
        root = (root_x + mean_u * root_z, root_y + mean_v * root_z, root_z)
        cost, error_x, error_y = reprojection_cost(root, miss_x, miss_y, z, rays, ratio, scale, BLOCKS)
        tl.store(weights + hypothesis, cost, mask=writes if EVEN_PARTS else writes & exists)
        # The larger of this cost and the lowest one gets a likelihood relative to the smaller.
        cost = tl.where(cost < infinity, cost, infinity)
        relative = tl.where(cost == lowest, 1.0, tl.exp2(-tl.abs(cost - lowest)))
        change, likelihood = tl.where(cost < lowest, relative, 1.0), tl.where(cost < lowest, 1.0, relative)
        lowest = tl.minimum(lowest, cost)
        if not EVEN_PARTS:
            likelihood = tl.where(exists, likelihood, 0.0)
        # A hypothesis without a root makes these sums NaN, which is handled after the loop.
        total = total * change + likelihood
        root_sums = _tuples.rescale_and_add(root_sums, change, likelihood, (root_x, root_y, root_z))
        errors_before, weighted_before = errors, weighted
        errors, weighted = (), ()
        for block in tl.static_range(BLOCKS):
            error = (error_x[block], error_y[block])
            if not EVEN_PARTS:
                error = _tuples.zero_unless(exists, error)
            sums = errors_before[block]
            square = sums[2] + error[0] * error[0] + error[1] * error[1]
            errors = errors + ((sums[0] + error[0], sums[1] + error[1], square),)
            joint = (miss_x[block], miss_y[block], z[block])
            weighted = weighted + (_tuples.rescale_and_add(weighted_before[block], change, likelihood, joint),)

    # The parts are added; all of them get the sums.
    least = tl.min(lowest, axis=1)[:, None, :] + zero
    change = tl.where(lowest == least, 1.0, tl.exp2(least - lowest))
    joined = (total * change, root_sums[0] * change, root_sums[1] * change, root_sums[2] * change)
    total, sum_x, sum_y, sum_z = _broadcast_to_parts(tl.reduce(joined, 1, _tuples.add_four), zero)
    lost = tl.where(_is_finite(sum_x + sum_y + sum_z), 0.0, 1.0)
    # A joint moves by this share of the way to its ray: S / (S + R), or 0 where that has no value.
    per_hypothesis, per_total = 1.0 / num_hypotheses, 1.0 / total
    u, v, _, _, _ = rays
    confidence = ()
    offsets, spreads, mean_offset, num_present = (), (), zero, zero
    for block in tl.static_range(BLOCKS):
        error_x, error_y, square = _broadcast_to_parts(tl.reduce(errors[block], 1, _tuples.add_three), zero)
        mean_x, mean_y = error_x * per_hypothesis, error_y * per_hypothesis
        offset = mean_x * mean_x + mean_y * mean_y
        spread = square * per_hypothesis - offset
        joint = block * LANES + lane
        # Read a second time: the loop has no registers left to keep it.
        weight = tl.load(confidence_ptr + (NUM_JOINTS * frame + joint), mask=joint < NUM_JOINTS, other=0.0)
        weight = weight.to(tl.float32)
        present, confidence = weight > 0.0, confidence + (tl.minimum(weight, 1.0),)
        mean_offset += tl.where(present, offset, 0.0)
        num_present += tl.where(present, 1.0, 0.0)
        offsets, spreads = offsets + (offset,), spreads + (tl.where(spread < 0.0, 0.0, spread),)  # NaN stays NaN
    mean_offset, num_present = tl.reduce((mean_offset, num_present), 2, _tuples.add_two)
    mean_offset = (mean_offset / num_present)[:, :, None]
    base, refined = (zero, zero, zero), ()
    for block in tl.static_range(BLOCKS):
        sums = weighted[block]
        joined = (sums[0] * change, sums[1] * change, sums[2] * change)
        near_x, near_y, depth = _broadcast_to_parts(tl.reduce(joined, 1, _tuples.add_three), zero)
        variance = tl.where(offsets[block] > mean_offset, offsets[block], mean_offset)
        trust = spreads[block] / (spreads[block] + variance)
        trust = tl.where(_is_finite(trust), trust, 0.0) * (max_shift * confidence[block])
        # The joint's place in the poses, minus its trusted share of the distance from the ray.
        joint_x, joint_y = u[block] * depth - near_x, v[block] * depth - near_y
        joint_x -= trust * (sum_x - near_x - (u[block] - mean_u) * sum_z)
        joint_y -= trust * (sum_y - near_y - (v[block] - mean_v) * sum_z)
        refined = refined + ((joint_x, joint_y, depth),)
        if block == 0:
            base = _broadcast_root(refined[0])
    tl.debug_barrier()  # all costs have been written
    if tl.max(lost) > 0.0:
        # A hypothesis without a root enters the mean as it is. The frame's other hypotheses are not refined then.
        unrefined, unrefined_base = _sum_unrefined(
            pose, weights, least, part, lane, num_hypotheses, NUM_JOINTS, PARTS, LANES, BLOCKS
        )
        base = _tuples.select(lost > 0.0, unrefined_base, base)
        with_roots = refined
        refined = ()
        for block in tl.static_range(BLOCKS):
            refined = refined + (_tuples.select(lost > 0.0, unrefined[block], with_roots[block]),)
        tl.debug_barrier()  # all costs have been read
    for begin in range(0, num_hypotheses, PARTS * LANES):
        hypothesis = begin + part * LANES + lane
        exists = (index < frames_here) & (hypothesis < num_hypotheses)
        likelihood = _likelihood(tl.load(weights + hypothesis, mask=exists, other=0.0), least)
        tl.store(weights + hypothesis, likelihood * per_total, mask=exists)

    # A store of one number in nine costs as much as a store of all nine, so a joint's results are stored at once:
    # xx xy xz xy | yy yz xz yz | zz and the mean | the weighted mean.
    row, column = tl.arange(0, FRAMES * LANES)[:, None], tl.arange(0, 16)[None, :]
    stride = tl.where(column < 9, 9, 3)
    to = tl.where(column < 9, covariance_ptr + column, mean_ptr + (column - 9))
    to = tl.where(column < 12, to, weighted_mean_ptr + (column - 12))
    item, exists = row // LANES * NUM_JOINTS + row % LANES, row // LANES < frames_here
    for block in tl.static_range(BLOCKS):
        sums, origin = tl.reduce(moments[block], 1, _tuples.add_nine), origins[block]
        origin = (_first_part(origin[0]), _first_part(origin[1]), _first_part(origin[2]))
        x, y, z, xx, yy, zz, xy, xz, yz = moments_of(origin, sums, num_hypotheses, HAS_COVARIANCE)
        moved_x = _first_part((refined[block][0] - base[0]) * per_total)
        moved_y = _first_part((refined[block][1] - base[1]) * per_total)
        moved_z = _first_part((refined[block][2] - base[2]) * per_total)
        results = stack_columns(
            _stack_flat(xx, yy, zz, moved_x), _stack_flat(xy, yz, x, moved_y), _stack_flat(xz, xz, y, moved_z),
            _stack_flat(xy, yz, z, z),
        )  # fmt: skip
        mask = exists & (column < 15)
        if (block + 1) * LANES > NUM_JOINTS:
            mask &= block * LANES + row % LANES < NUM_JOINTS
        tl.store(to + block * LANES * stride + item * stride, results, mask=mask)
