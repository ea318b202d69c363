"""reverse_step in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch
from diffupose.kernels.philox import philox_normal_blocks
from diffupose.kernels.philox_normal import seed_tensor

_BLOCK = 1024  # numbers for one program at most


@triton.jit
def _if_used(mask, coefficient):
    """Return the mask where a coefficient is not 0, else an empty one."""
    return mask & (tl.zeros(mask.shape, tl.float32) + coefficient != 0.0)


@triton.jit
def _draw(
    seed_ptr, frame_ids_ptr, hypothesis_ids_ptr, step, first, num_frames, num_hypotheses,
    NUMEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the noise of the BLOCK numbers from ``first`` on, those of the last few not meant.

    Four numbers of a pose share a counter, and 51 numbers are no multiple of four: noise is drawn in its own order, and
    then every thread gets what belongs to its numbers.
    """
    per_pose: tl.constexpr = (NUMEL + 3) // 4
    first_pose = first // NUMEL
    into = (first - first_pose * NUMEL).to(tl.int32)  # where in its pose the first number is
    first_frame = first_pose // num_hypotheses
    first_hypothesis = (first_pose - first_frame * num_hypotheses).to(tl.int32)
    index = into // 4 + tl.arange(0, BLOCK // 4)
    pose = index // per_pose
    block = index - pose * per_pose
    row = first_hypothesis + pose
    next_frame = row // num_hypotheses
    hypothesis = row - next_frame * num_hypotheses
    frame = first_frame + next_frame
    frame_ids = tl.load(frame_ids_ptr + frame, mask=frame < num_frames, other=0)
    hypothesis_ids = tl.load(hypothesis_ids_ptr + hypothesis)
    z = philox_normal_blocks(tl.load(seed_ptr), frame_ids, hypothesis_ids, step, block)
    number = (into + tl.arange(0, BLOCK)).to(tl.uint32)  # unsigned numbers are divided by fewer instructions
    source = number.to(tl.int32) - into // 4 * 4 + (number // NUMEL).to(tl.int32) * (4 * per_pose - NUMEL)
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
    seed_ptr,  # [1], int64, or None: no row draws noise; as are the ids
    frame_ids_ptr,  # [B]
    hypothesis_ids_ptr,  # [H]
    prev_ptr,  # [B, H, J, 3], may be sample_ptr
    x0_ptr,  # [B, H, J, 3], may be x0_last_ptr; or None
    clip,  # None does not clip
    total,  # numbers of sample: as an argument Triton sees that 16 divides it, and joins loads
    num_frames,
    num_hypotheses,
    NUM_JOINTS: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    LARGE: tl.constexpr,
    PIECE: tl.constexpr,  # numbers of a program
    BLOCK: tl.constexpr,  # a power of two
):
    """x0 = clip(p x_t + q out);  x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s scale z   (one row of the table).

    What a coefficient of 0 stands before is neither read nor added: a NaN in it does not matter.
    """
    step = tl.load(step_ptr)
    row = table_ptr + 6 * step
    p, q, c_x = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    c_0, c_1, s = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    numel: tl.constexpr = 3 * NUM_JOINTS
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    first = program * PIECE
    at = tl.arange(0, BLOCK)  # from there: 32 bits are enough
    mask = (at < PIECE) & (first + at < total)
    # All that is read is read first, so that the reads overlap, and by masks: a branch waits for what it has asked for
    # before the next one asks.
    x_t = tl.load(sample_ptr + first + at, mask=_if_used(mask, tl.abs(p) + tl.abs(c_x)), other=0.0).to(tl.float32)
    if OUTPUT_STRIDE == 3:
        from_output = output_ptr + first + at
    else:
        first_joint = first // 3
        channel = (first - 3 * first_joint).to(tl.int32) + at  # from that joint's first
        joint = channel // 3
        if LARGE:
            joint = joint.to(tl.int64)
        from_output = output_ptr + first_joint * OUTPUT_STRIDE + (joint * (OUTPUT_STRIDE - 3) + channel)
    out = tl.load(from_output, mask=_if_used(mask, q), other=0.0).to(tl.float32)
    if x0_last_ptr is not None:
        last = tl.load(x0_last_ptr + first + at, mask=_if_used(mask, c_1), other=0.0).to(tl.float32)
    if (noise_ptr is not None) or (seed_ptr is not None):
        if noise_ptr is not None:
            z = tl.load(noise_ptr + first + at, mask=_if_used(mask, s), other=0.0).to(tl.float32)
        else:
            z = tl.zeros(at.shape, tl.float32)
            # A real branch: drawing costs more than the rest together.
            if s != 0.0:
                z = _draw(
                    seed_ptr, frame_ids_ptr, hypothesis_ids_ptr, step, first, num_frames, num_hypotheses,
                    numel, BLOCK,
                )  # fmt: skip
        if scale_ptr is not None:
            element = ((first % numel).to(tl.int32) + at) % numel
            scale = tl.load(scale_ptr + step * numel + element, mask=_if_used(mask, s), other=0.0)
            z = scale.to(tl.float32) * z
    x0, x_prev = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32)
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
        x_prev = tl.full(at.shape, float("nan"), tl.float32)  # nobody could know before that this row needs it
    if (noise_ptr is not None) or (seed_ptr is not None):
        x_prev += s * z
    elif s != 0.0:
        x_prev = tl.full(at.shape, float("nan"), tl.float32)
    tl.store(prev_ptr + first + at, x_prev, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + first + at, x0, mask=mask)


def _piece(numel: int) -> int:
    """Return how many numbers a program takes whose noise has at most _BLOCK / 4 counters, wherever they begin."""
    per_pose = (numel + 3) // 4
    # Where it begins and where it ends a piece shares counters with others: at most 2.25 of them.
    return (_BLOCK // 4 - 3) * numel // per_pose // 16 * 16  # begins at a multiple of 16 bytes


def reverse_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    x0_last: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    seed: int | Tensor = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    clip_sample_range: float | None = None,
    *,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``x_prev`` and ``x0``; see ``diffupose.ops.reverse_step``, which checks what can be checked on the host.

    Everything that changes from step to step lies on the device, so that a graph of one step can be replayed for all.

    Args:
        sample: ``[B, H, J, 3]``, as are ``x0_last`` and ``noise``; any floating-point type but float64.
        model_output: ``[B, H, J, C]`` with C >= 3.
        table: ``[S, 6]``, float32, on the device.
        step: ``[1]``, int64, on the device: the row.
        x0_last: Where c_1 of the row is not 0 and this is None, ``x_prev`` becomes NaN.
        noise: Given noise.
        noise_scale: ``[S, J, 3]``.
        seed: Of drawn noise, as in ``philox_normal``.
        ids: Frame and hypothesis ids of drawn noise, int64. Where a row has noise and neither it nor these are given,
            ``x_prev`` becomes NaN.
        clip_sample_range: Limit of x0.
        out: Where the results go, contiguous; ``(sample, x0_last)`` works in place, with None x0 is not kept.
    """
    frames, hypotheses, joints, _ = sample.shape
    sample = sample.contiguous()
    x0_last, noise, noise_scale = (
        None if tensor is None else tensor.contiguous() for tensor in (x0_last, noise, noise_scale)
    )
    flat = model_output[..., :3].flatten(0, 2)  # [B H J, 3]
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    if out is not None and not all(tensor is None or tensor.is_contiguous() for tensor in out):
        raise ValueError("out must be contiguous")
    if out is None:
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        out = torch.empty_like(sample, dtype=dtype), torch.empty_like(sample, dtype=dtype)
    seed_on_device, frame_ids, hypothesis_ids = None, None, None
    piece = _BLOCK
    if ids is not None and noise is None and sample.numel() > 0:
        seed_on_device = seed_tensor(seed, sample.device)
        frame_ids, hypothesis_ids = (tensor.contiguous() for tensor in ids)
        piece = _piece(3 * joints)
    programs = triton.cdiv(sample.numel(), piece)
    _launch.launch(
        reverse_step_kernel,
        (programs,),
        sample, flat, table, step, x0_last, noise, noise_scale, seed_on_device, frame_ids, hypothesis_ids, *out,
        clip_sample_range, sample.numel(), frames, hypotheses,
        NUM_JOINTS=joints, OUTPUT_STRIDE=flat.stride(0),
        LARGE=_launch.is_large(sample, flat), PIECE=piece, BLOCK=_BLOCK, num_warps=4,
        # The operations of the other backends, each rounded by itself.
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
