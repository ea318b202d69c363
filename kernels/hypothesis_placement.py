"""Placing hypotheses before the camera, and their reprojection costs, in Triton.

Tensors are ``[FRAMES, PARTS, LANES]``. Values of joints are tuples of such tensors, as in ``hypothesis_view.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffupose.kernels import _tuples


@triton.jit
def _add_and_minimum(a0, a1, b0, b1):
    return a0 + b0, tl.minimum(a1, b1)


@triton.jit
def _maximum_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def load_axis(pose, lane, AXIS: tl.constexpr, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr):
    """Return one coordinate of a hypothesis for each of the thread's joints; 0 past the last joint."""
    values = ()
    for block in tl.static_range(BLOCKS):
        pointers = pose + (3 * LANES * block + AXIS)
        if (block + 1) * LANES > NUM_JOINTS:
            values = values + (tl.load(pointers, mask=lane < NUM_JOINTS - block * LANES, other=0.0),)
        else:
            values = values + (tl.load(pointers),)
    return values


@triton.jit
def prefetch(pose, lane, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr):
    """Ask for a hypothesis to be brought from memory to the L2 cache; ``pose`` points to each lane's first joint.

    The lanes' addresses are at most 60 bytes apart, since one request fetches 64 bytes.
    """
    share: tl.constexpr = (3 * NUM_JOINTS + LANES - 1) // LANES
    address = (pose + (tl.minimum(lane * share, 3 * NUM_JOINTS - 1) - 3 * lane)).to(tl.int64)
    # Triton needs a result from inline assembly, so a zero is written.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def viewing_rays(keypoints, confidences, camera, lane, temperature, NUM_JOINTS: tl.constexpr, LANES: tl.constexpr,
                 BLOCKS: tl.constexpr):  # fmt: skip
    """Return what all hypotheses of a frame share: the rays of its keypoints and the scale of its costs.

    Returns:
        ``(u, v, slope_u, slope_v, share)`` per joint: the ray ``((x - cx) / fx, (y - cy) / fy)``, 0 where the keypoint
        is missing; how much the depth changes per unit of distance from that ray; the share of the confidences. Then
        per frame: the mean ray u and v, fy / fx, and what turns an error in units of fx into a cost.
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
        single_x, single_y, present = own_x.to(tl.float32), own_y.to(tl.float32), weight > 0.0
        right = tl.maximum(right, tl.where(present, single_x, nowhere))
        left = tl.maximum(left, tl.where(present, -single_x, nowhere))
        bottom = tl.maximum(bottom, tl.where(present, single_y, nowhere))
        top = tl.maximum(top, tl.where(present, -single_y, nowhere))
        x, y, confidence = x + (own_x,), y + (own_y,), confidence + (weight,)
    right, left, bottom, top = tl.reduce((right, left, bottom, top), 2, _maximum_four)
    side = tl.maximum(right + left, bottom + top)[:, :, None]
    corner_x, corner_y = -left[:, :, None], -top[:, :, None]
    # Nearly parallel rays differ in their last digits only. So pixels are subtracted from each other first.
    total, mean_x, mean_y = tl.zeros_like(nowhere), tl.zeros_like(nowhere), tl.zeros_like(nowhere)
    from_corner_x, from_corner_y = (), ()
    for block in tl.static_range(BLOCKS):
        present = confidence[block] > 0.0
        own_x = tl.where(present, (x[block] - corner_x).to(tl.float32), 0.0)
        own_y = tl.where(present, (y[block] - corner_y).to(tl.float32), 0.0)
        total += confidence[block]
        mean_x, mean_y = mean_x + confidence[block] * own_x, mean_y + confidence[block] * own_y
        from_corner_x, from_corner_y = from_corner_x + (own_x,), from_corner_y + (own_y,)
    total, mean_x, mean_y = tl.reduce((total, mean_x, mean_y), 2, _tuples.add_three)
    inverse = (1.0 / total)[:, :, None]
    mean_x, mean_y = mean_x[:, :, None] * inverse, mean_y[:, :, None] * inverse
    # The mean is corrected once: a confidence far above the others would multiply its rounding error.
    rest_x, rest_y = tl.zeros_like(nowhere), tl.zeros_like(nowhere)
    from_mean_x, from_mean_y = (), ()
    for block in tl.static_range(BLOCKS):
        own_x, own_y = from_corner_x[block] - mean_x, from_corner_y[block] - mean_y
        rest_x, rest_y = rest_x + confidence[block] * own_x, rest_y + confidence[block] * own_y
        from_mean_x, from_mean_y = from_mean_x + (own_x,), from_mean_y + (own_y,)
    rest_x, rest_y = tl.reduce((rest_x, rest_y), 2, _tuples.add_two)
    rest_x, rest_y = rest_x[:, :, None] * inverse, rest_y[:, :, None] * inverse
    mean_x, mean_y = mean_x + rest_x, mean_y + rest_y
    fx, fy = tl.load(camera).to(tl.float32), tl.load(camera + 4).to(tl.float32)
    cx, cy = tl.load(camera + 2), tl.load(camera + 5)
    per_fx, per_fy = 1.0 / fx, 1.0 / fy
    u, v, from_mean_u, from_mean_v, spread = (), (), (), (), tl.zeros_like(nowhere)
    for block in tl.static_range(BLOCKS):
        present = confidence[block] > 0.0
        own_u, own_v = (from_mean_x[block] - rest_x) * per_fx, (from_mean_y[block] - rest_y) * per_fy
        spread += confidence[block] * (own_u * own_u + own_v * own_v)
        u = u + (tl.where(present, (x[block] - cx).to(tl.float32) * per_fx, 0.0),)
        v = v + (tl.where(present, (y[block] - cy).to(tl.float32) * per_fy, 0.0),)
        from_mean_u, from_mean_v = from_mean_u + (own_u,), from_mean_v + (own_v,)
    spread = tl.sum(spread, axis=2)[:, :, None]
    mean_u = ((corner_x - cx).to(tl.float32) + mean_x) * per_fx
    mean_v = ((corner_y - cy).to(tl.float32) + mean_y) * per_fy
    # Where all rays coincide the depth is free: NaN, which spreads to all that is computed from it.
    per_spread = tl.where(spread * inverse > 1e-20, -1.0 / spread, float("nan"))
    shares, slope_u, slope_v = (), (), ()
    for block in tl.static_range(BLOCKS):
        slope = confidence[block] * per_spread
        slope_u, slope_v = slope_u + (slope * from_mean_u[block],), slope_v + (slope * from_mean_v[block],)
        shares = shares + (confidence[block] * inverse,)
    # A likelihood is 2^-cost, so the scale has the factor log2(e).
    scale = tl.abs(fx) * 1.4426950408889634 / (tl.maximum(side, 2e-6) * temperature)
    return (u, v, slope_u, slope_v, shares), mean_u, mean_v, fy * per_fx, scale


@triton.jit
def fit_root(x, y, z, rays, BLOCKS: tl.constexpr):
    """Return the root of a hypothesis and its joints' distances from their rays with the root at 0.

    The root t solves t_x - u t_z = u Z - X, and the same for y, by weighted linear least squares; it is NaN where the
    depth is free. It is returned as its distances from the mean ray and its depth. These distances are as small as a
    body, so sums of them lose no digits.
    """
    u, v, slope_u, slope_v, share = rays
    miss_x, miss_y, zero = (), (), tl.zeros_like(x[0])
    sum_x, sum_y, depth = zero, zero, zero
    for block in tl.static_range(BLOCKS):
        to_x, to_y = u[block] * z[block] - x[block], v[block] * z[block] - y[block]
        sum_x, sum_y = sum_x + share[block] * to_x, sum_y + share[block] * to_y
        depth += slope_u[block] * to_x + slope_v[block] * to_y
        miss_x, miss_y = miss_x + (to_x,), miss_y + (to_y,)
    sum_x, sum_y, depth = tl.reduce((sum_x, sum_y, depth), 2, _tuples.add_three)
    return sum_x[:, :, None], sum_y[:, :, None], depth[:, :, None], miss_x, miss_y


@triton.jit
def _with_sign_of(size, sign):
    """Return ``size`` with the sign of ``sign``; both are float32."""
    bits = (sign.to(tl.int32, bitcast=True) & -0x80000000) | (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def reprojection_cost(root, miss_x, miss_y, z, rays, ratio, scale, BLOCKS: tl.constexpr):
    """Return the cost of a placed hypothesis, and its joints' image distances from their keypoints per focal length.

    The cost is the weighted mean distance from the keypoints, in units of box side times temperature. It is infinite
    where a joint lies behind the camera, and NaN where there is no root.
    """
    root_x, root_y, root_z = root
    u, v, _, _, share = rays
    error_x, error_y, cost = (), (), tl.zeros_like(root_x)
    nearest = cost + float("inf")
    for block in tl.static_range(BLOCKS):
        depth = tl.where(share[block] > 0.0, z[block] + root_z, 1.0)
        root_of_inverse = tl.rsqrt(tl.abs(depth))
        per_depth = _with_sign_of(root_of_inverse * root_of_inverse, depth)  # fewer instructions than a quotient
        # A difference of metres that is divided by the depth loses no digits.
        own_x = (root_x - miss_x[block] - u[block] * root_z) * per_depth
        own_y = (root_y - miss_y[block] - v[block] * root_z) * per_depth
        in_fx = ratio * own_y
        cost += share[block] * tl.sqrt(own_x * own_x + in_fx * in_fx)
        nearest = tl.minimum(nearest, depth)
        error_x, error_y = error_x + (own_x,), error_y + (own_y,)
    cost, nearest = tl.reduce((cost, nearest), 2, _add_and_minimum)
    cost, nearest = cost[:, :, None] * scale, nearest[:, :, None]
    # A root of NaN makes the cost NaN: NaN times 0 is NaN.
    cost = tl.where(nearest > 1e-3, cost, float("inf")) + (root_x + root_y + root_z) * 0.0
    return cost, error_x, error_y
