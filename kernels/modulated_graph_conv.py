"""modulated_graph_conv in Triton: what follows the matrix product, forward and backward.

out[n, j] = A[j, j] M[j] own[n, j] + sum_{i != j} A[j, i] M[i] neighbor[n, i] + bias,   hidden = [own | neighbor]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffupose.kernels import _launch

# How sums over poses are split depends on the number of poses only, not on the GPU.
_MOST_PARTS, _POSES_PER_PART = 64, 16

Activation = Literal["none", "relu", "gelu"]


class Epilogue(NamedTuple):
    """What follows the convolution in inference.

    out = activation(convolution) + residual;   with film: out = silu(scale[step] out + shift[step])
    """

    activation: Activation = "none"
    residual: Tensor | None = None
    """``[N, J, C]``, contiguous."""
    film: Tensor | None = None
    """``[S, 2 C]``, float32: scales, then shifts, of every step."""
    step: Tensor | None = None
    """``[1]``, int64, on the device: the row of ``film``."""


@triton.jit
def modulated_graph_conv_fwd_kernel(
    hidden_ptr,  # [N, J, 2 C]
    modulation_ptr,  # [J, C], float32
    adjacency_ptr,  # [J, J], float32
    own_ptr,  # [J, C], float32; None is the diagonal of the adjacency times the modulation
    bias_ptr,  # [C], float32, or None
    residual_ptr,  # [N, J, C] or None
    film_ptr,  # [S, 2 C], scales and shifts, float32, or None
    step_ptr,  # [1], int64: the row of film
    out_ptr,  # [N, J, C]
    channels,
    num_joints: tl.constexpr,
    UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute y = activation(convolution) + residual of a pose and BLOCK_C channels; film: silu(scale y + shift)."""
    pose = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    joint = tl.arange(0, BLOCK_J)
    inside_c, inside_j = column < channels, joint < num_joints
    inside = inside_j[:, None] & inside_c[None, :]
    hidden = hidden_ptr + pose * num_joints * 2 * channels
    tile = joint[:, None] * channels + column[None, :]  # [BLOCK_J, BLOCK_C] of [J, C]

    own = tl.load(hidden + tile + joint[:, None] * channels, mask=inside, other=0.0).to(tl.float32)
    if own_ptr is not None:
        total = tl.load(own_ptr + tile, mask=inside, other=0.0) * own
    else:
        modulation = tl.load(modulation_ptr + tile, mask=inside, other=0.0)
        diagonal = tl.load(adjacency_ptr + joint * (num_joints + 1), mask=inside_j, other=0.0)
        total = diagonal[:, None] * modulation * own
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside_c, other=0.0)[None, :]
    for i in tl.range(num_joints, loop_unroll_factor=UNROLL):
        neighbor = tl.load(hidden + (2 * i + 1) * channels + column, mask=inside_c, other=0.0).to(tl.float32)
        scaled = neighbor * tl.load(modulation_ptr + i * channels + column, mask=inside_c, other=0.0)
        weights = tl.load(adjacency_ptr + joint * num_joints + i, mask=inside_j & (joint != i), other=0.0)
        total += weights[:, None] * scaled[None, :]

    if ACTIVATION == "relu":
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    at = pose * num_joints * channels + tile
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if film_ptr is not None:
        film = film_ptr + tl.load(step_ptr) * 2 * channels + column
        scale = tl.load(film, mask=inside_c, other=0.0)[None, :]
        shift = tl.load(film + channels, mask=inside_c, other=0.0)[None, :]
        total = total * scale + shift
        total = total / (1.0 + tl.exp(-total))
    tl.store(out_ptr + at, total, mask=inside)


@triton.jit
def modulated_graph_conv_bwd_kernel(
    grad_ptr,  # [N, J, C], of the output
    hidden_ptr,  # [N, J, 2 C]
    modulation_ptr,  # [J, C], float32
    adjacency_ptr,  # [J, J], float32
    grad_hidden_ptr,  # [N, J, 2 C]
    own_ptr,  # [parts, J, C]: sums of own * grad
    neighbor_ptr,  # [parts, J, C]: sums of neighbor * back
    bias_ptr,  # [parts, C]: sums of grad
    outer_ptr,  # [parts, tiles of C, BLOCK_J, BLOCK_J]: sums of grad (M neighbor)^T
    num_poses,
    num_joints,
    channels,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of hidden, and sums, for one part of the poses and BLOCK_C channels.

    In the formulas, back = offdiag(A)^T grad.
    """
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    joint, other = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_J)
    inside_c, inside_j = column < channels, joint < num_joints
    inside = inside_j[:, None] & inside_c[None, :]
    tile = joint[:, None] * channels + column[None, :]
    modulation = tl.load(modulation_ptr + tile, mask=inside, other=0.0)
    diagonal = tl.load(adjacency_ptr + joint * (num_joints + 1), mask=inside_j, other=0.0)
    own_sum = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    neighbor_sum = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    outer = tl.zeros((BLOCK_J, BLOCK_J), tl.float32)
    for pose in range(num_poses * part // parts, num_poses * (part + 1) // parts):
        grads, rows = grad_ptr + pose * num_joints * channels, pose * num_joints * 2 * channels
        at = rows + tile + joint[:, None] * channels
        grad = tl.load(grads + tile, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
        neighbor = tl.load(hidden_ptr + at + channels, mask=inside, other=0.0).to(tl.float32)
        back = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
        for i in range(num_joints):
            row = tl.load(grads + i * channels + column, mask=inside_c, other=0.0).to(tl.float32)
            weights = tl.load(adjacency_ptr + i * num_joints + joint, mask=inside_j & (joint != i), other=0.0)
            back += weights[:, None] * row[None, :]
        tl.store(grad_hidden_ptr + at, diagonal[:, None] * modulation * grad, mask=inside)
        tl.store(grad_hidden_ptr + at + channels, modulation * back, mask=inside)
        own_sum += own * grad
        neighbor_sum += neighbor * back
        bias_sum += tl.sum(grad, axis=0)
        # TF32 would lose 13 bits of the gradient.
        outer = tl.dot(grad, tl.trans(modulation * neighbor), outer, input_precision="ieee")
    sums = part * num_joints * channels + tile
    tl.store(own_ptr + sums, own_sum, mask=inside)
    tl.store(neighbor_ptr + sums, neighbor_sum, mask=inside)
    tl.store(bias_ptr + part * channels + column, bias_sum, mask=inside_c)
    square = (part * tl.num_programs(1) + tl.program_id(1)) * BLOCK_J * BLOCK_J
    tl.store(outer_ptr + square + joint[:, None] * BLOCK_J + other[None, :], outer)


@triton.jit
def modulated_graph_conv_sum_kernel(
    own_ptr,  # [parts, J, C]; this and the next three come from the backward kernel
    neighbor_ptr,  # [parts, J, C]
    bias_ptr,  # [parts, C]
    outer_ptr,  # [squares, BLOCK_J, BLOCK_J]
    modulation_ptr,  # [J, C]
    adjacency_ptr,  # [J, J]
    grad_modulation_ptr,  # [J, C]
    grad_adjacency_ptr,  # [J, J]
    grad_bias_ptr,  # [C]
    parts,
    squares,
    num_joints,
    channels,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the parts in their order: one joint's row of both gradients, or, in the last program, the bias."""
    joint = tl.program_id(0)
    if joint == num_joints:
        for start in range(0, channels, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            total = tl.zeros((BLOCK_C,), tl.float32)
            for part in range(parts):
                total += tl.load(bias_ptr + part * channels + column, mask=column < channels, other=0.0)
            tl.store(grad_bias_ptr + column, total, mask=column < channels)
    else:
        diagonal = tl.load(adjacency_ptr + joint * (num_joints + 1))
        on_diagonal = 0.0
        for start in range(0, channels, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = column < channels
            own, neighbor = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
            for part in range(parts):
                at = (part * num_joints + joint) * channels + column
                own += tl.load(own_ptr + at, mask=inside, other=0.0)
                neighbor += tl.load(neighbor_ptr + at, mask=inside, other=0.0)
            at = joint * channels + column
            modulation = tl.load(modulation_ptr + at, mask=inside, other=0.0)
            tl.store(grad_modulation_ptr + at, diagonal * own + neighbor, mask=inside)
            on_diagonal += tl.sum(modulation * own, axis=0)
        other = tl.arange(0, BLOCK_J)
        row = tl.zeros((BLOCK_J,), tl.float32)
        for square in range(squares):
            row += tl.load(outer_ptr + (square * BLOCK_J + joint) * BLOCK_J + other)
        row = tl.where(other == joint, on_diagonal, row)
        tl.store(grad_adjacency_ptr + joint * num_joints + other, row, mask=other < num_joints)


def modulated_graph_conv_fwd(
    hidden: Tensor,
    modulation: Tensor,
    adjacency: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    own: Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Return ``out``, filled with the graph convolution of its matrix product and with what follows it.

    A folded BatchNorm scales a channel, as the modulation does, so it is part of ``modulation`` and ``bias``.

    Args:
        hidden: The product ``x [W0 | W1]``, ``[N, J, 2 C]``, contiguous; float32, float16 or bfloat16, as are ``out``
            and the residual.
        modulation: ``[J, C]``, float32, contiguous, as are the other parameters.
        adjacency: ``[J, J]``.
        bias: ``[C]`` or None.
        out: ``[N, J, C]``, contiguous; it may be the residual.
        own: ``[J, C]``, the factors of the product with a joint's own weight. None takes the diagonal of ``adjacency``
            times ``modulation``.
        epilogue: What follows in inference; None is nothing.
    """
    poses, joints, channels = out.shape
    activation, residual, film, step = Epilogue() if epilogue is None else epilogue
    # Unrolled, the loop over neighbours has all its loads in flight. On an H200 that saved a quarter of the time in
    # float32, but added 40 % in 16 bits. With more joints there are too few registers.
    single = hidden.dtype == torch.float32
    # ``own`` is one more tile in registers, so fewer channels fit.
    block_c = min(128 if own is None else 64, max(16, _launch.next_power_of_2(channels)))
    _launch.launch(
        modulated_graph_conv_fwd_kernel,
        (poses, triton.cdiv(channels, block_c)),
        hidden, modulation, adjacency, own, bias, residual, film, step, out, channels,
        num_joints=joints, UNROLL=joints if single and joints <= 32 else 1, ACTIVATION=activation,
        BLOCK_J=_launch.next_power_of_2(joints), BLOCK_C=block_c,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def modulated_graph_conv_bwd(
    grad_out: Tensor, hidden: Tensor, modulation: Tensor, adjacency: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, modulation, adjacency and bias: the last three in float32.

    The sums over poses are the same bits in every run.

    Args:
        grad_out: ``[N, J, C]``, contiguous, N at least 1.
        hidden: The product of the forward call, ``[N, J, 2 C]``, contiguous.
        modulation: ``[J, C]``, float32, contiguous.
        adjacency: ``[J, J]``, float32, contiguous.
    """
    poses, joints, channels = grad_out.shape
    parts = min(max(poses // _POSES_PER_PART, 1), _MOST_PARTS)
    block_j = max(16, _launch.next_power_of_2(joints))  # tl.dot takes no smaller tiles
    # With more joints, fewer channels fit into registers and more warps share a tile. More warps also share it if the
    # number of channels is no multiple of 16: its addresses take more registers.
    many = block_j > 32
    block_c, warps = 16 if many else 32, 8 if many or channels % 16 else 4
    tiles = triton.cdiv(channels, block_c)
    grad_hidden = torch.empty_like(hidden)
    own, neighbor = modulation.new_empty(2, parts, joints, channels)
    bias, outer = modulation.new_empty(parts, channels), modulation.new_empty(parts * tiles, block_j, block_j)
    _launch.launch(
        modulated_graph_conv_bwd_kernel,
        (parts, tiles),
        grad_out, hidden, modulation, adjacency, grad_hidden, own, neighbor, bias, outer, poses, joints, channels,
        BLOCK_J=block_j, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    grad_modulation, grad_adjacency = torch.empty_like(modulation), torch.empty_like(adjacency)
    grad_bias = modulation.new_empty(channels)
    _launch.launch(
        modulated_graph_conv_sum_kernel,
        (joints + 1,),
        own, neighbor, bias, outer, modulation, adjacency, grad_modulation, grad_adjacency, grad_bias,
        parts, parts * tiles, joints, channels,
        BLOCK_J=block_j, BLOCK_C=min(256, max(16, _launch.next_power_of_2(channels))),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return grad_hidden, grad_modulation, grad_adjacency, grad_bias
