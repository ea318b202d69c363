"""hypothesis_statistics in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch

# Numbers of one axis that a program holds at once, the hypotheses of a frame as long as they are few, and that a thread
# does: more do not fit its registers, the fewer the more is made of them; and a hypothesis has numbers of its own, of
# which there are too many where its joints are few.
_VIEW, _VIEW_OF_FEW_JOINTS = (1024, 4), (256, 4)
_JOINTS = 128  # of a program of the moments: one for each thread


@triton.jit
def _load_poses(frame_ptr, start, num_hypotheses, num_joints, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr):
    """Return x, y and z ``[BLOCK_H, BLOCK_J]`` of some hypotheses, 0 where there are none, and where there are."""
    hypothesis = start + tl.arange(0, BLOCK_H)
    joint = tl.arange(0, BLOCK_J)
    inside = (hypothesis < num_hypotheses)[:, None] & (joint < num_joints)[None, :]
    at = frame_ptr + hypothesis[:, None] * (3 * num_joints) + 3 * joint[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    y = tl.load(at + 1, mask=inside, other=0.0)
    z = tl.load(at + 2, mask=inside, other=0.0)
    return x, y, z, inside


@triton.jit
def _place(x, y, z, u, v, w, total, mean_u, mean_v, spread):
    """Return the roots ``[BLOCK_H]`` by weighted linear least squares, NaN where they are free.

    t_x - u t_z = u Z - X, and the same for y; in float64: normal equations lose digits.
    """
    right_u = u[None, :] * z.to(tl.float64) - x.to(tl.float64)  # [BLOCK_H, BLOCK_J]
    right_v = v[None, :] * z.to(tl.float64) - y.to(tl.float64)
    sum_u = tl.sum(w[None, :] * right_u, axis=1)
    sum_v = tl.sum(w[None, :] * right_v, axis=1)
    depth = -tl.sum(w[None, :] * ((u - mean_u)[None, :] * right_u + (v - mean_v)[None, :] * right_v), axis=1)
    # Divided once, for all hypotheses; NaN where all rays coincide, and what is multiplied by it.
    usable = spread > 1e-20 * total
    depth *= tl.where(usable, 1.0 / spread, float("nan"))
    inverse = 1.0 / total
    root_x, root_y = sum_u * inverse + mean_u * depth, sum_v * inverse + mean_v * depth
    return root_x.to(tl.float32), root_y.to(tl.float32), depth.to(tl.float32)


@triton.jit
def _cost(x, y, z, root_x, root_y, root_z, seen_x, seen_y, weight, fx, fy, cx, cy, scale):
    """Return ``[BLOCK_H]``: the weighted mean distance of the placed poses from the keypoints, times ``scale``."""
    depth = z + root_z[:, None]  # [BLOCK_H, BLOCK_J]
    off_x = fx * tl.div_rn(x + root_x[:, None], depth) + cx - seen_x[None, :]
    off_y = fy * tl.div_rn(y + root_y[:, None], depth) + cy - seen_y[None, :]
    # Behind the camera there is no image.
    distance = tl.where(depth > 1e-3, tl.sqrt_rn(off_x * off_x + off_y * off_y), float("inf"))
    return tl.sum(tl.where(weight[None, :] > 0.0, distance * weight[None, :], 0.0), axis=1) * scale


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _extent(values, present):
    """Return from the smallest to the largest of those that are present; less than 0 where none is."""
    infinity = float("inf")
    return tl.max(tl.where(present, values, -infinity), axis=0) - tl.min(tl.where(present, values, infinity), axis=0)


@triton.jit
def moments_kernel(
    hypotheses_ptr,  # [B, H, J, 3]
    mean_ptr,  # [B, J, 3]
    covariance_ptr,  # [B, J, 3, 3]
    total,  # B J
    num_hypotheses,
    ENOUGH: tl.constexpr,
    NUM_JOINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and covariance alone, of BLOCK joints of frames.

    Eight hypotheses at a time, read from memory once and from the cache again: their mean and products of differences
    from it, which are then joined to those before (Chan et al. 1983): no digits are lost however long the sum. In
    differences from the first hypothesis, so that equal ones have exactly that mean and a covariance of zero.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    own = hypotheses_ptr + index // NUM_JOINTS * num_hypotheses * (3 * NUM_JOINTS) + index % NUM_JOINTS * 3
    first_x = tl.load(own, mask=mask, other=0.0)
    first_y = tl.load(own + 1, mask=mask, other=0.0)
    first_z = tl.load(own + 2, mask=mask, other=0.0)
    zeros = tl.zeros((BLOCK,), tl.float32)
    nothing = tl.zeros((BLOCK,), tl.int32)  # makes a mask of what is one number for all
    mean_x, mean_y, mean_z = zeros, zeros, zeros
    xx, yy, zz, xy, xz, yz = zeros, zeros, zeros, zeros, zeros, zeros
    for begin in range(0, num_hypotheses, 8):
        center_x, center_y, center_z = zeros, zeros, zeros
        for h in tl.static_range(8):
            there = mask & (nothing + begin + h < num_hypotheses)
            at = own + (begin + h) * (3 * NUM_JOINTS)
            center_x += tl.where(there, tl.load(at, mask=there, other=0.0) - first_x, 0.0)
            center_y += tl.where(there, tl.load(at + 1, mask=there, other=0.0) - first_y, 0.0)
            center_z += tl.where(there, tl.load(at + 2, mask=there, other=0.0) - first_z, 0.0)
        size = tl.minimum(num_hypotheses - begin, 8).to(tl.float32) + zeros
        center_x = tl.div_rn(center_x, size)
        center_y = tl.div_rn(center_y, size)
        center_z = tl.div_rn(center_z, size)
        for h in tl.static_range(8):
            there = mask & (nothing + begin + h < num_hypotheses)
            at = own + (begin + h) * (3 * NUM_JOINTS)
            x = tl.where(there, tl.load(at, mask=there, other=0.0) - first_x - center_x, 0.0)
            y = tl.where(there, tl.load(at + 1, mask=there, other=0.0) - first_y - center_y, 0.0)
            z = tl.where(there, tl.load(at + 2, mask=there, other=0.0) - first_z - center_z, 0.0)
            xx += x * x
            yy += y * y
            zz += z * z
            xy += x * y
            xz += x * z
            yz += y * z
        share = tl.div_rn(size, size + begin)
        both = begin * share
        x, y, z = center_x - mean_x, center_y - mean_y, center_z - mean_z
        xx += both * x * x
        yy += both * y * y
        zz += both * z * z
        xy += both * x * y
        xz += both * x * z
        yz += both * y * z
        mean_x += share * x
        mean_y += share * y
        mean_z += share * z
    count = zeros + num_hypotheses
    at = mean_ptr + 3 * index
    tl.store(at, first_x + mean_x, mask=mask)
    tl.store(at + 1, first_y + mean_y, mask=mask)
    tl.store(at + 2, first_z + mean_z, mask=mask)
    degrees = count - 1.0 if ENOUGH else zeros + float("nan")  # they cannot span 3D
    at = covariance_ptr + 9 * index
    tl.store(at, tl.div_rn(xx, degrees), mask=mask)
    tl.store(at + 4, tl.div_rn(yy, degrees), mask=mask)
    tl.store(at + 8, tl.div_rn(zz, degrees), mask=mask)
    xy, xz, yz = tl.div_rn(xy, degrees), tl.div_rn(xz, degrees), tl.div_rn(yz, degrees)
    tl.store(at + 1, xy, mask=mask)
    tl.store(at + 3, xy, mask=mask)
    tl.store(at + 2, xz, mask=mask)
    tl.store(at + 6, xz, mask=mask)
    tl.store(at + 5, yz, mask=mask)
    tl.store(at + 7, yz, mask=mask)


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
    part,
    temperature,
    num_hypotheses,
    num_joints,
    SHARED_CAMERA: tl.constexpr,
    ENOUGH: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One frame; the formulas stand in ``diffupose/reference/hypothesis_statistics.py``.

    Sums of differences from the mean need several rounds over the hypotheses. All but the first find them in registers
    (SINGLE) or in the cache: memory is read once.
    """
    frame = tl.program_id(0).to(tl.int64)
    poses = hypotheses_ptr + frame * num_hypotheses * num_joints * 3
    joint = tl.arange(0, BLOCK_J)
    real = joint < num_joints
    # With one round the compiler sees that it is one, and what the rounds share.
    end = BLOCK_H if SINGLE else num_hypotheses
    zeros = tl.zeros((BLOCK_J,), tl.float32)
    count = zeros + num_hypotheses

    # Averaging differences makes the mean of equal hypotheses exactly that pose, and their covariance exactly zero.
    first_x = tl.load(poses + 3 * joint, mask=real, other=0.0)
    first_y = tl.load(poses + 3 * joint + 1, mask=real, other=0.0)
    first_z = tl.load(poses + 3 * joint + 2, mask=real, other=0.0)
    mean_x, mean_y, mean_z = zeros, zeros, zeros
    for start in range(0, end, BLOCK_H):
        x, y, z, inside = _load_poses(poses, start, num_hypotheses, num_joints, BLOCK_H, BLOCK_J)
        mean_x += tl.sum(tl.where(inside, x - first_x[None, :], 0.0), axis=0)
        mean_y += tl.sum(tl.where(inside, y - first_y[None, :], 0.0), axis=0)
        mean_z += tl.sum(tl.where(inside, z - first_z[None, :], 0.0), axis=0)
    mean_x = first_x + tl.div_rn(mean_x, count)
    mean_y = first_y + tl.div_rn(mean_y, count)
    mean_z = first_z + tl.div_rn(mean_z, count)

    xx, yy, zz, xy, xz, yz = zeros, zeros, zeros, zeros, zeros, zeros
    if ENOUGH:
        for start in range(0, end, BLOCK_H):
            x, y, z, inside = _load_poses(poses, start, num_hypotheses, num_joints, BLOCK_H, BLOCK_J)
            x = tl.where(inside, x - mean_x[None, :], 0.0)
            y = tl.where(inside, y - mean_y[None, :], 0.0)
            z = tl.where(inside, z - mean_z[None, :], 0.0)
            xx += tl.sum(x * x, axis=0)
            yy += tl.sum(y * y, axis=0)
            zz += tl.sum(z * z, axis=0)
            xy += tl.sum(x * y, axis=0)
            xz += tl.sum(x * z, axis=0)
            yz += tl.sum(y * z, axis=0)
        degrees = count - 1.0
    else:
        degrees = zeros + float("nan")  # they cannot span 3D

    confidence = tl.load(confidence_ptr + frame * num_joints + joint, mask=real, other=0.0).to(tl.float64)
    present = confidence > 0.0
    at = keypoints_ptr + (frame * num_joints + joint) * 2
    pixel_x = tl.load(at, mask=present, other=0.0).to(tl.float64)
    pixel_y = tl.load(at + 1, mask=present, other=0.0).to(tl.float64)
    camera = intrinsics_ptr
    if not SHARED_CAMERA:
        camera += 9 * frame
    fx, fy = tl.load(camera).to(tl.float64), tl.load(camera + 4).to(tl.float64)
    cx, cy = tl.load(camera + 2).to(tl.float64), tl.load(camera + 5).to(tl.float64)
    u = tl.where(present, (pixel_x - cx) * (1.0 / fx), 0.0)
    v = tl.where(present, (pixel_y - cy) * (1.0 / fy), 0.0)
    total = tl.sum(confidence, axis=0)
    inverse = 1.0 / total
    mean_u, mean_v = tl.sum(confidence * u, axis=0) * inverse, tl.sum(confidence * v, axis=0) * inverse
    spread = tl.sum(confidence * ((u - mean_u) * (u - mean_u) + (v - mean_v) * (v - mean_v)), axis=0)

    fx, fy, cx, cy = fx.to(tl.float32), fy.to(tl.float32), cx.to(tl.float32), cy.to(tl.float32)
    seen_x, seen_y, weight = pixel_x.to(tl.float32), pixel_y.to(tl.float32), confidence.to(tl.float32)
    ray_x = tl.where(present, tl.div_rn(seen_x - cx, fx + zeros), 0.0)
    ray_y = tl.where(present, tl.div_rn(seen_y - cy, fy + zeros), 0.0)
    half_side = 0.5 * tl.maximum(_extent(seen_x, present), _extent(seen_y, present))
    side = 2.0 * tl.maximum(half_side, 1e-6)
    scale = 1.0 / tl.sum(weight, axis=0) / (side * temperature)

    # Each round places the hypotheses anew, where it does not find that in registers: their roots are not stored.
    infinity = float("inf")
    lowest = infinity
    across_x, across_y = zeros, zeros
    for start in range(0, end, BLOCK_H):
        x, y, z, inside = _load_poses(poses, start, num_hypotheses, num_joints, BLOCK_H, BLOCK_J)
        root_x, root_y, root_z = _place(x, y, z, u, v, confidence, total, mean_u, mean_v, spread)
        cost = _cost(x, y, z, root_x, root_y, root_z, seen_x, seen_y, weight, fx, fy, cx, cy, scale)
        there = start + tl.arange(0, BLOCK_H) < num_hypotheses
        lowest = tl.minimum(lowest, tl.min(tl.where(there & (cost < infinity), cost, infinity), axis=0))
        depth = z + root_z[:, None]
        across_x += tl.sum(tl.where(inside, tl.div_rn(x + root_x[:, None], depth), 0.0), axis=0)
        across_y += tl.sum(tl.where(inside, tl.div_rn(y + root_y[:, None], depth), 0.0), axis=0)
    across_x, across_y = tl.div_rn(across_x, count), tl.div_rn(across_y, count)

    variance, sum_weights = zeros, 0.0
    for start in range(0, end, BLOCK_H):
        x, y, z, inside = _load_poses(poses, start, num_hypotheses, num_joints, BLOCK_H, BLOCK_J)
        root_x, root_y, root_z = _place(x, y, z, u, v, confidence, total, mean_u, mean_v, spread)
        cost = _cost(x, y, z, root_x, root_y, root_z, seen_x, seen_y, weight, fx, fy, cx, cy, scale)
        there = start + tl.arange(0, BLOCK_H) < num_hypotheses
        sum_weights += tl.sum(_likelihood(cost, lowest, there), axis=0)
        depth = z + root_z[:, None]
        off_x = tl.div_rn(x + root_x[:, None], depth) - across_x[None, :]
        off_y = tl.div_rn(y + root_y[:, None], depth) - across_y[None, :]
        variance += tl.sum(tl.where(inside, off_x * off_x + off_y * off_y, 0.0), axis=0)
    variance = tl.div_rn(variance, count)

    # Which part of the way to its ray a joint goes: S / (S + R), where that has a value.
    offset = (across_x - ray_x) * (across_x - ray_x) + (across_y - ray_y) * (across_y - ray_y)
    usual = tl.sum(tl.where(present, offset, 0.0), axis=0) / tl.sum(present.to(tl.float32), axis=0)
    share = tl.div_rn(variance, variance + tl.where(offset > usual, offset, usual))
    share = tl.where(_is_finite(share), share, 0.0) * (part * tl.minimum(weight, 1.0))

    sum_x, sum_y, sum_z = zeros, zeros, zeros
    for start in range(0, end, BLOCK_H):
        x, y, z, inside = _load_poses(poses, start, num_hypotheses, num_joints, BLOCK_H, BLOCK_J)
        root_x, root_y, root_z = _place(x, y, z, u, v, confidence, total, mean_u, mean_v, spread)
        cost = _cost(x, y, z, root_x, root_y, root_z, seen_x, seen_y, weight, fx, fy, cx, cy, scale)
        hypothesis = start + tl.arange(0, BLOCK_H)
        there = hypothesis < num_hypotheses
        weights = tl.div_rn(_likelihood(cost, lowest, there), sum_weights + tl.zeros((BLOCK_H,), tl.float32))
        tl.store(weights_ptr + frame * num_hypotheses + hypothesis, weights, mask=there)
        placed = (_is_finite(root_x) & _is_finite(root_y) & _is_finite(root_z))[:, None]
        depth = z + root_z[:, None]
        moved_x, moved_y = x + root_x[:, None], y + root_y[:, None]
        moved_x += share[None, :] * (ray_x[None, :] * depth - moved_x)
        moved_y += share[None, :] * (ray_y[None, :] * depth - moved_y)
        is_root = (joint == 0)[None, :]
        moved_x -= tl.sum(tl.where(is_root, moved_x, 0.0), axis=1)[:, None]
        moved_y -= tl.sum(tl.where(is_root, moved_y, 0.0), axis=1)[:, None]
        depth -= tl.sum(tl.where(is_root, depth, 0.0), axis=1)[:, None]
        sum_x += tl.sum(tl.where(inside, weights[:, None] * tl.where(placed, moved_x, x), 0.0), axis=0)
        sum_y += tl.sum(tl.where(inside, weights[:, None] * tl.where(placed, moved_y, y), 0.0), axis=0)
        sum_z += tl.sum(tl.where(inside, weights[:, None] * tl.where(placed, depth, z), 0.0), axis=0)
    _store_poses(weighted_mean_ptr + frame * num_joints * 3, sum_x, sum_y, sum_z, real, 3)

    _store_poses(mean_ptr + frame * num_joints * 3, mean_x, mean_y, mean_z, real, 3)
    xx, yy, zz = tl.div_rn(xx, degrees), tl.div_rn(yy, degrees), tl.div_rn(zz, degrees)
    xy, xz, yz = tl.div_rn(xy, degrees), tl.div_rn(xz, degrees), tl.div_rn(yz, degrees)
    matrices = covariance_ptr + frame * num_joints * 9
    _store_poses(matrices, xx, xy, xz, real, 9)
    _store_poses(matrices + 3, xy, yy, yz, real, 9)
    _store_poses(matrices + 6, xz, yz, zz, real, 9)


@triton.jit
def _likelihood(cost, lowest, there):
    """Return e^(lowest - cost); where no hypothesis can be placed all count alike."""
    cost = tl.where(cost < float("inf"), cost, float("inf"))  # NaN counts as infinitely far
    nowhere = tl.zeros(cost.shape, tl.float32) + lowest == float("inf")
    return tl.where(there, tl.where(nowhere, 1.0, tl.exp(lowest - cost)), 0.0)


@triton.jit
def _store_poses(pointer, x, y, z, mask, STRIDE: tl.constexpr):
    at = pointer + STRIDE * tl.arange(0, x.shape[0])
    tl.store(at, x, mask=mask)
    tl.store(at + 1, y, mask=mask)
    tl.store(at + 2, z, mask=mask)


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
    shared = intrinsics is not None and intrinsics.ndim == 2
    if keypoints_2d is None:
        _launch.launch(
            moments_kernel,
            (triton.cdiv(frames * joints, _JOINTS),),
            hypotheses, mean, covariance, frames * joints, count,
            ENOUGH=count >= 4, NUM_JOINTS=joints, BLOCK=_JOINTS, num_warps=_JOINTS // 32, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, covariance, weights, weighted_mean
    weights, weighted_mean = hypotheses.new_empty(frames, count), torch.empty_like(mean)
    view = [None if tensor is None else tensor.contiguous() for tensor in (keypoints_2d, confidence, intrinsics)]
    tile, in_thread = _VIEW if joints > 16 else _VIEW_OF_FEW_JOINTS
    block_j = _launch.next_power_of_2(joints)
    block_h = min(_launch.next_power_of_2(count), max(1, tile // block_j))
    _launch.launch(
        hypothesis_statistics_kernel,
        (frames,),
        hypotheses, *view, mean, covariance, weights, weighted_mean, weight, temperature, count, joints,
        SHARED_CAMERA=shared, ENOUGH=count >= 4, SINGLE=count <= block_h, BLOCK_H=block_h, BLOCK_J=block_j,
        num_warps=min(8, max(1, block_h * block_j // (32 * in_thread))), enable_fp_fusion=True,
    )  # fmt: skip
    return mean, covariance, weights, weighted_mean
