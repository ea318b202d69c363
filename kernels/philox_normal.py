"""philox_normal in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch
from diffupose.kernels.philox import philox_normal_blocks

_BLOCKS = 256  # blocks of four numbers per program


@triton.jit
def philox_normal_kernel(
    out_ptr,  # [B, H, NUMEL]
    seed_ptr,  # [1]
    frame_ids_ptr,  # [B]
    hypothesis_ids_ptr,  # [H]
    step,
    num_frames,
    num_hypotheses,
    NUMEL: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Draw the noise of one step for all frames, hypotheses and elements; see ``reference/philox_normal.py``."""
    per_pose: tl.constexpr = (NUMEL + 3) // 4
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    index = program * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    pose, block = index // per_pose, index % per_pose
    frame, hypothesis = pose // num_hypotheses, pose % num_hypotheses
    inside = frame < num_frames
    frame_ids = tl.load(frame_ids_ptr + frame, mask=inside, other=0)
    hypothesis_ids = tl.load(hypothesis_ids_ptr + hypothesis)
    z = philox_normal_blocks(tl.load(seed_ptr), frame_ids, hypothesis_ids, step, block)  # [BLOCKS, 4]
    element = 4 * block[:, None] + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + pose[:, None] * NUMEL + element, z, mask=inside[:, None] & (element < NUMEL))


def philox_normal(
    seed: int | Tensor, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int
) -> Tensor:
    """Return noise ``[B, H, num_elements]``, float32; see ``diffupose.ops.philox_normal``, which checks the arguments.

    Args:
        seed: A signed 64-bit number. A graph that replays the call takes an int64 tensor ``[1]`` on the device.
        frame_ids: ``[B]``, int64.
        hypothesis_ids: ``[H]``, int64.
        step: Row of the step table.
        num_elements: Numbers per hypothesis.
    """
    frame_ids, hypothesis_ids = frame_ids.contiguous(), hypothesis_ids.contiguous()
    shape = (len(frame_ids), len(hypothesis_ids), num_elements)
    out = torch.empty(shape, dtype=torch.float32, device=frame_ids.device)
    blocks = shape[0] * shape[1] * ((num_elements + 3) // 4)
    _launch.launch(
        philox_normal_kernel,
        (triton.cdiv(blocks, _BLOCKS),),
        out, seed_tensor(seed, out.device), frame_ids, hypothesis_ids, step, shape[0], shape[1],
        NUMEL=num_elements, LARGE=_launch.is_large(out), BLOCKS=_BLOCKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """Return a seed as the kernels read it: ``[1]``, int64. It is filled on the device; a copy would wait for it."""
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)
