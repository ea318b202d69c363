"""reverse_step in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch
from diffupose.kernels.philox import philox_normal_blocks
from diffupose.kernels.philox_normal import seed_tensor

_BLOCK = 1024  # numbers per program at most


class TableRow(NamedTuple):
    """A row of the sampler's table. It is read on the device, so one graph of a step can be replayed for all rows."""

    table: Tensor
    """``[S, 6]``, float32."""
    step: Tensor
    """``[1]``, int64: the row."""
    noise_scale: Tensor | None = None
    """``[S, J, 3]``, what noise is multiplied by; None is 1."""


class DrawnNoise(NamedTuple):
    """Noise that the kernel draws, as in ``philox_normal``."""

    seed: int | Tensor
    frame_ids: Tensor
    """``[B]``, int64."""
    hypothesis_ids: Tensor
    """``[H]``, int64."""


@triton.jit
def _if_used(mask, coefficient):
    """Return the mask if a coefficient is not 0, else an empty mask."""
    return mask & (tl.zeros(mask.shape, tl.float32) + coefficient != 0.0)


@triton.jit
def _draw(
    seed_ptr, frame_ids_ptr, hypothesis_ids_ptr, step, first, num_frames, num_hypotheses,
    NUMEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the noise of the BLOCK numbers from ``first`` on; past the program's last number it means nothing.

    Four numbers of a pose share a counter, and the 51 numbers of a pose are no multiple of four. So noise is drawn
    counter by counter, and each thread then gathers that of its own numbers.
    """
    per_pose: tl.constexpr = (NUMEL + 3) // 4
    first_pose = first // NUMEL
    offset = (first - first_pose * NUMEL).to(tl.int32)  # of the first number in its pose
    first_frame = first_pose // num_hypotheses
    first_hypothesis = (first_pose - first_frame * num_hypotheses).to(tl.int32)
    index = offset // 4 + tl.arange(0, BLOCK // 4)
    pose = index // per_pose
    block = index - pose * per_pose
    row = first_hypothesis + pose
    next_frame = row // num_hypotheses
    hypothesis = row - next_frame * num_hypotheses
    frame = first_frame + next_frame
    frame_ids = tl.load(frame_ids_ptr + frame, mask=frame < num_frames, other=0)
    hypothesis_ids = tl.load(hypothesis_ids_ptr + hypothesis)
    z = philox_normal_blocks(tl.load(seed_ptr), frame_ids, hypothesis_ids, step, block)
    number = (offset + tl.arange(0, BLOCK)).to(tl.uint32)  # unsigned division takes fewer instructions
    source = number.to(tl.int32) - offset // 4 * 4 + (number // NUMEL).to(tl.int32) * (4 * per_pose - NUMEL)
    return tl.gather(tl.reshape(z, (BLOCK,)), tl.minimum(source, BLOCK - 1), 0)


@triton.jit
def reverse_step_kernel(
    sample_ptr,  # [B, H, J, 3]
    output_ptr,  # [B, H, J, C], OUTPUT_STRIDE between joints
    table_ptr,  # [S, 6]: p, q, c_x, c_0, c_1, s
    step_ptr,  # [1], int64
    x0_last_ptr,  # [B, H, J, 3] or None
    noise_ptr,  # [B, H, J, 3] or None
    scale_ptr,  # [S, J, 3] or None
    seed_ptr,  # [1], int64, or None if no row draws noise; so are the ids
    frame_ids_ptr,  # [B]
    hypothesis_ids_ptr,  # [H]
    prev_ptr,  # [B, H, J, 3], may be sample_ptr
    x0_ptr,  # [B, H, J, 3], may be x0_last_ptr; or None
    clip,  # None does not clip
    total,  # numbers of sample; as an argument Triton sees that 16 divides it, and widens loads
    num_frames,
    num_hypotheses,
    NUM_JOINTS: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    LARGE: tl.constexpr,
    PER_PROGRAM: tl.constexpr,  # numbers of a program
    BLOCK: tl.constexpr,  # a power of two, at least PER_PROGRAM
):
    """x0 = clip(p x_t + q out);  x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s scale z   (one row of the table).

    A term whose coefficient is 0 is neither read nor added, so a NaN in it does not matter.
    """
    step = tl.load(step_ptr)
    row = table_ptr + 6 * step
    p, q, c_x = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    c_0, c_1, s = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    numel: tl.constexpr = 3 * NUM_JOINTS
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    first = program * PER_PROGRAM
    offset = tl.arange(0, BLOCK)  # from the first number, so 32 bits are enough
    mask = (offset < PER_PROGRAM) & (first + offset < total)
    # All loads come first so that they overlap. Masks turn them off: a branch would wait for its own loads.
    x_t = tl.load(sample_ptr + first + offset, mask=_if_used(mask, tl.abs(p) + tl.abs(c_x)), other=0.0).to(tl.float32)
    if OUTPUT_STRIDE == 3:
        from_output = output_ptr + first + offset
    else:
        first_joint = first // 3
        channel = (first - 3 * first_joint).to(tl.int32) + offset  # counts from that joint's first channel
        joint = channel // 3
        if LARGE:
            joint = joint.to(tl.int64)
        from_output = output_ptr + first_joint * OUTPUT_STRIDE + (joint * (OUTPUT_STRIDE - 3) + channel)
    out = tl.load(from_output, mask=_if_used(mask, q), other=0.0).to(tl.float32)
    if x0_last_ptr is not None:
        last = tl.load(x0_last_ptr + first + offset, mask=_if_used(mask, c_1), other=0.0).to(tl.float32)
    if (noise_ptr is not None) or (seed_ptr is not None):
        if noise_ptr is not None:
            z = tl.load(noise_ptr + first + offset, mask=_if_used(mask, s), other=0.0).to(tl.float32)
        else:
            z = tl.zeros(offset.shape, tl.float32)
            # This is a real branch: drawing costs more than everything else together.
            if s != 0.0:
                z = _draw(
                    seed_ptr, frame_ids_ptr, hypothesis_ids_ptr, step, first, num_frames, num_hypotheses,
                    numel, BLOCK,
                )  # fmt: skip
        if scale_ptr is not None:
            element = ((first % numel).to(tl.int32) + offset) % numel
            scale = tl.load(scale_ptr + step * numel + element, mask=_if_used(mask, s), other=0.0)
            z = scale.to(tl.float32) * z
    x0, x_prev = tl.zeros(offset.shape, tl.float32), tl.zeros(offset.shape, tl.float32)
    if p != 0.0:
        x0 = p * x_t
    x0 += q * out  # 0 times 0 where it was not read
    if clip is not None:
        x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN stays NaN
    if c_x != 0.0:
        x_prev = c_x * x_t
    if c_0 != 0.0:
        x_prev += c_0 * x0
    if x0_last_ptr is not None:
        x_prev += c_1 * last
    elif c_1 != 0.0:
        x_prev = tl.full(offset.shape, float("nan"), tl.float32)  # the host could not know that this row needs it
    if (noise_ptr is not None) or (seed_ptr is not None):
        x_prev += s * z
    elif s != 0.0:
        x_prev = tl.full(offset.shape, float("nan"), tl.float32)
    tl.store(prev_ptr + first + offset, x_prev, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + first + offset, x0, mask=mask)


def _numbers_per_program(numel: int) -> int:
    """Return how many numbers need at most _BLOCK / 4 counters, wherever they begin; ``numel`` is those of a pose."""
    counters_per_pose = (numel + 3) // 4
    # At both ends counters are shared with other programs: at most 2.25 of them.
    return (_BLOCK // 4 - 3) * numel // counters_per_pose // 16 * 16  # every program begins at a multiple of 16 bytes


def reverse_step(
    sample: Tensor,
    model_output: Tensor,
    row: TableRow,
    x0_last: Tensor | None = None,
    noise: Tensor | DrawnNoise | None = None,
    clip_sample_range: float | None = None,
    *,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``x_prev`` and ``x0``; see ``diffupose.ops.reverse_step``, which checks what can be checked on the host.

    Args:
        sample: ``[B, H, J, 3]``, as are ``x0_last`` and given noise; any floating-point type but float64.
        model_output: ``[B, H, J, C]`` with C >= 3.
        row: The row of the table, on the device.
        x0_last: The previous step's x0. If c_1 of the row is not 0 and this is None, ``x_prev`` becomes NaN.
        noise: Noise, or how to draw it. If the row has noise and this is None, ``x_prev`` becomes NaN.
        clip_sample_range: Limit of x0.
        out: Where the results go, contiguous. ``(sample, x0_last)`` works in place; with None, x0 is not kept.
    """
    frames, hypotheses, joints, _ = sample.shape
    sample = sample.contiguous()
    flat = model_output[..., :3].flatten(0, 2)  # [B H J, 3]
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    if out is None:
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        out = torch.empty_like(sample, dtype=dtype), torch.empty_like(sample, dtype=dtype)
    elif not all(tensor is None or tensor.is_contiguous() for tensor in out):
        raise ValueError("out must be contiguous")
    seed, frame_ids, hypothesis_ids = None, None, None
    per_program = _BLOCK
    if isinstance(noise, DrawnNoise):
        if sample.numel() > 0:
            seed = seed_tensor(noise.seed, sample.device)
            frame_ids, hypothesis_ids = noise.frame_ids.contiguous(), noise.hypothesis_ids.contiguous()
            per_program = _numbers_per_program(3 * joints)
        noise = None
    x0_last, noise, noise_scale = (
        None if tensor is None else tensor.contiguous() for tensor in (x0_last, noise, row.noise_scale)
    )
    _launch.launch(
        reverse_step_kernel,
        (triton.cdiv(sample.numel(), per_program),),
        sample, flat, row.table, row.step, x0_last, noise, noise_scale, seed, frame_ids, hypothesis_ids, *out,
        clip_sample_range, sample.numel(), frames, hypotheses,
        NUM_JOINTS=joints, OUTPUT_STRIDE=flat.stride(0),
        LARGE=_launch.is_large(sample, flat), PER_PROGRAM=per_program, BLOCK=_BLOCK, num_warps=4,
        # Each operation is rounded by itself, as on the other backends.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
