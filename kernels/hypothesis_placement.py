"""Where a frame's hypotheses stand before the camera that saw it, and how well they project, in Triton.

Tensors are ``[FRAMES, PARTS, LANES]``, those of joints tuples of them, as ``hypothesis_view.py`` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Several reductions at once, as threads wait for each other in each of them.
@triton.jit
def add_two(a0, a1, b0, b1):
    """Return the sums of two pairs."""
    return a0 + b0, a1 + b1


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    """Return the sums of three pairs."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add_and_nearer(a0, a1, b0, b1):
    return a0 + b0, tl.minimum(a1, b1)


@triton.jit
def _larger_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def read(pose, lane, AXIS: tl.constexpr, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr):
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
def prefetch(pose, lane, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr):
    """Have the hypothesis at ``pose``, each lane's pointer to its first joint, brought from memory to L2.

    So that a read of it need not wait for memory. Lanes ask for places up to 60 bytes apart: memory gives 64 at once.
    """
    share: tl.constexpr = (3 * NUM_JOINTS + LANES - 1) // LANES
    at = (pose + (tl.minimum(lane * share, 3 * NUM_JOINTS - 1) - 3 * lane)).to(tl.int64)
    # An operation of this kind has a result.
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def look(keypoints, confidences, camera, lane, temperature, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr,
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
    total, mean_x, mean_y = tl.reduce((total, mean_x, mean_y), 2, add_three)
    inverse = (1.0 / total)[:, :, None]
    mean_x, mean_y = mean_x[:, :, None] * inverse, mean_y[:, :, None] * inverse
    # Once more: by what the rounded mean is off, a confidence far above the others would weigh.
    rest_x, rest_y = tl.zeros_like(nowhere), tl.zeros_like(nowhere)
    off_x, off_y = (), ()
    for block in tl.static_range(BLOCKS):
        own_x, own_y = from_x[block] - mean_x, from_y[block] - mean_y
        rest_x, rest_y = rest_x + confidence[block] * own_x, rest_y + confidence[block] * own_y
        off_x, off_y = off_x + (own_x,), off_y + (own_y,)
    rest_x, rest_y = tl.reduce((rest_x, rest_y), 2, add_two)
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
def place(x, y, z, rays, BLOCKS: tl.constexpr):
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
    sum_x, sum_y, depth = tl.reduce((sum_x, sum_y, depth), 2, add_three)
    return sum_x[:, :, None], sum_y[:, :, None], depth[:, :, None], miss_x, miss_y


@triton.jit
def _signed(size, sign):
    """Return ``size`` with the sign of ``sign``; both are float32."""
    bits = (sign.to(tl.int32, bitcast=True) & -0x80000000) | (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def project(root_x, root_y, root_z, miss_x, miss_y, z, rays, ratio, scale, BLOCKS: tl.constexpr):
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
