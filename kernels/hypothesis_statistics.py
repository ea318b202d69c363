"""hypothesis_statistics in Triton."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from diffupose.kernels import _launch
from diffupose.kernels.hypothesis_moments import moments_kernel
from diffupose.kernels.hypothesis_view import hypothesis_statistics_kernel

_WARPS = 4
_THREADS = 32 * _WARPS
_VIEW_THREADS = 128  # at most; one warp, wherever that is enough, which waits for no other
_AT_ONCE = 16  # hypotheses of a joint that a thread of the moments reads at once, where there are no more
_HYPOTHESES = 32  # of a frame for a thread, where there are threads enough
_JOINTS_IN_THREAD = 5  # at most
_REGISTERS = 255  # of a thread at most: left to itself the compiler may spill some, so that more warps fit
_AHEAD = 3  # hypotheses after the present one that memory is asked for, which answers after one or two by estimate


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
    # Sums of squares lose digits by how far the mean of some is off, in parts of the spread, and the more there are.
    some = min(-(-count // 6), 8)
    if keypoints_2d is None:
        # Few hypotheses are a constant: nothing is made for more.
        few = count if count <= _AT_ONCE else 0
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
    lanes = _launch.next_power_of_2(triton.cdiv(joints, _JOINTS_IN_THREAD))
    parts = min(_launch.next_power_of_2(triton.cdiv(count, _HYPOTHESES)), max(1, _VIEW_THREADS // lanes))
    threads = max(32, lanes * parts)
    per_program = threads // (lanes * parts)
    ahead = _AHEAD if _launch.generation_of(hypotheses.device) > 0 else 0  # by an instruction of NVIDIA's GPUs
    _launch.launch(
        hypothesis_statistics_kernel,
        (triton.cdiv(frames, per_program),),
        hypotheses, *view, mean, covariance, weights, weighted_mean, weight, temperature, frames, count,
        SHARED_CAMERA=intrinsics is not None and intrinsics.ndim == 2, ENOUGH=count >= 4, WHOLE=count % parts == 0,
        NUM_JOINTS=joints, FEW=min(some, math.isqrt(count // 10) + 1), FRAMES=per_program, PARTS=parts, LANES=lanes,
        BLOCKS=triton.cdiv(joints, lanes), AHEAD=ahead,
        num_warps=threads // 32, maxnreg=_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, covariance, weights, weighted_mean
