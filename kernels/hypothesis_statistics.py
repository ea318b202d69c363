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
# At most in a program with a view. One warp waits for no other, so one is taken wherever it is enough.
_VIEW_THREADS = 128
_UNROLLED = 16  # up to so many hypotheses, the loads of all of them are in flight together
_HYPOTHESES = 32  # of a frame per thread, where there are enough threads
_JOINTS_PER_THREAD = 5  # at most
_REGISTERS = 255  # per thread at most: on its own the compiler may spill some so that more warps fit
_PREFETCHED = 3  # hypotheses after the present one; by estimate memory answers after one or two


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
    float32. A frame's result is the same bits in every batch.
    """
    hypotheses = hypotheses.contiguous()
    frames, count, joints, _ = hypotheses.shape
    mean, covariance = hypotheses.new_empty(frames, joints, 3), hypotheses.new_empty(frames, joints, 3, 3)
    weights, weighted_mean = hypotheses.new_empty(0), hypotheses.new_empty(0)
    # The farther the origin of the sums lies from the mean, and the more hypotheses there are, the more digits sums of
    # squares lose.
    sampled = min(-(-count // 6), 8)
    if keypoints_2d is None:
        # A constant number of hypotheses needs no loop.
        constant = count if count <= _UNROLLED else 0
        _launch.launch(
            moments_kernel,
            (triton.cdiv(frames * joints, _THREADS),),
            hypotheses, mean, covariance, frames * joints, count,
            COUNT=constant, HAS_COVARIANCE=count >= 4, NUM_JOINTS=joints, SAMPLED=sampled, UNROLLED=constant or 8,
            BLOCK=_THREADS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, covariance, weights, weighted_mean
    weights, weighted_mean = hypotheses.new_empty(frames, count), torch.empty_like(mean)
    view = [None if tensor is None else tensor.contiguous() for tensor in (keypoints_2d, confidence, intrinsics)]
    lanes = _launch.next_power_of_2(triton.cdiv(joints, _JOINTS_PER_THREAD))
    parts = min(_launch.next_power_of_2(triton.cdiv(count, _HYPOTHESES)), max(1, _VIEW_THREADS // lanes))
    threads = max(32, lanes * parts)
    frames_per_program = threads // (lanes * parts)
    # The prefetch is an instruction of NVIDIA's GPUs, which Triton's interpreter does not know.
    prefetched = _PREFETCHED if _launch.generation_of(hypotheses.device) > 0 else 0
    _launch.launch(
        hypothesis_statistics_kernel,
        (triton.cdiv(frames, frames_per_program),),
        hypotheses, *view, mean, covariance, weights, weighted_mean, weight, temperature, frames, count,
        SHARED_CAMERA=intrinsics is not None and intrinsics.ndim == 2, HAS_COVARIANCE=count >= 4,
        EVEN_PARTS=count % parts == 0, NUM_JOINTS=joints, SAMPLED=min(sampled, math.isqrt(count // 10) + 1),
        FRAMES=frames_per_program, PARTS=parts, LANES=lanes, BLOCKS=triton.cdiv(joints, lanes), PREFETCHED=prefetched,
        num_warps=threads // 32, maxnreg=_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, covariance, weights, weighted_mean
