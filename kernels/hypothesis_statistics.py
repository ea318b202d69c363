"""hypothesis_statistics in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from diffupose.kernels import _launch
from diffupose.kernels.hypothesis_moments import moments_kernel
from diffupose.kernels.hypothesis_view import hypothesis_statistics_kernel

_WARPS, _VIEW_WARPS = 4, 2
_THREADS, _VIEW_THREADS = 32 * _WARPS, 32 * _VIEW_WARPS
_AT_ONCE = 16  # hypotheses of a joint that a thread of the moments reads at once, where there are no more
_HYPOTHESES = 64  # of a program with a view, of several frames where they are fewer
_JOINTS_IN_THREAD = 5  # of a hypothesis that is placed
_REGISTERS = 112  # of a thread with a view at most: with more of them fewer blocks fit a multiprocessor


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
    # Sums of squares lose digits by how far the mean of some is off, in parts of the spread, and the more there are.
    some = min(-(-count // 6), 8)
    if keypoints_2d is None:
        _launch.launch(
            moments_kernel,
            (triton.cdiv(frames * joints, _THREADS),),
            hypotheses, mean, covariance, frames * joints, count,
            COUNT=few, ENOUGH=count >= 4, NUM_JOINTS=joints, FEW=some, AT_ONCE=few or 8, BLOCK=_THREADS,
            num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, covariance, weights, weighted_mean
    weights, weighted_mean = hypotheses.new_empty(frames, count), torch.empty_like(mean)
    view = [None if tensor is None else tensor.contiguous() for tensor in (keypoints_2d, confidence, intrinsics)]
    kept = hypotheses.new_empty(frames, 8)
    roots = hypotheses.new_empty(frames, count, 4)
    per_program = max(1, min(_VIEW_THREADS // joints, _HYPOTHESES // count))
    block = max(32, _launch.next_power_of_2(per_program * joints))
    lanes = _launch.next_power_of_2(triton.cdiv(joints, _JOINTS_IN_THREAD))
    _launch.launch(
        hypothesis_statistics_kernel,
        (triton.cdiv(frames, per_program),),
        hypotheses, *view, mean, covariance, weights, weighted_mean, kept, roots, weight, temperature, frames, count,
        COUNT=few, SHARED_CAMERA=intrinsics is not None and intrinsics.ndim == 2, ENOUGH=count >= 4, NUM_JOINTS=joints,
        FRAMES=per_program, FRAME_BLOCK=_launch.next_power_of_2(per_program),
        JOINT_BLOCK=_launch.next_power_of_2(joints), BLOCK=block, PARTS=max(1, _VIEW_THREADS // block), FEW=some,
        AT_ONCE=2,
        WEIGHTS_H=min(_launch.next_power_of_2(count), 1024), ROWS=max(1, _VIEW_THREADS // lanes), LANES=lanes,
        SECTORS=min(_launch.next_power_of_2(per_program * count * joints * 3 // 8 + 1), 1024),
        num_warps=_VIEW_WARPS, maxnreg=_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, covariance, weights, weighted_mean
