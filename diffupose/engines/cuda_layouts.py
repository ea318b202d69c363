"""How weights and activations lie in memory for the CUDA engine's kernels.

``pairs`` is that of ``csrc/engine/cuda/fragments.cuh``, ``wgmma`` and ``cluster`` are those of the families of kernels
in ``csrc/engine/cuda/persistent`` and ``csrc/engine/cuda/cluster``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

BLOCK = 16
"""Channels are padded to a multiple of this, the depth of one matrix instruction."""

LayoutName = Literal["pairs", "wgmma", "cluster"]


def channel_blocks(channels: int) -> int:
    """Return the number of blocks of 16 channels that hold these."""
    return -(-channels // BLOCK)


@dataclass(frozen=True)
class Layout:
    """How the tensors of a program lie in memory.

    Attributes:
        joints: To how many the joints of activations are padded.
        tensor_joints: To how many those of the layers' tensors are.
        tile_poses: Poses whose activations lie together, a tile.
        adjacency_stride: Columns of an adjacency matrix.
        packers: By a tensor's name, the function that reorders it after padding. The others stay in row-major order.
        by_phase: Whether thread blocks that share activations wait for each other after products only (``cuda_plan``).
        staging_bytes: What a kernel keeps behind the activations of a tile.
    """

    joints: int
    tensor_joints: int
    tile_poses: int
    adjacency_stride: int
    packers: Mapping[str, Callable[[Tensor], Tensor]]
    by_phase: bool = False
    staging_bytes: int = 0

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of a layer as the kernels read it, on the CPU."""
        tensor = tensor.detach().to("cpu", torch.float32)
        channels = BLOCK * channel_blocks(tensor.shape[-1])
        if name == "adjacency":
            tensor = _pad(tensor, self.tensor_joints, self.adjacency_stride)
        elif name == "weight":
            tensor = _pad(tensor, BLOCK * channel_blocks(tensor.shape[-2]), channels)
        else:
            tensor = _pad(tensor, self.tensor_joints, channels) if tensor.ndim == 2 else _pad(tensor, channels)
        packer = self.packers.get(name)
        return (tensor if packer is None else packer(tensor)).contiguous()


def layout_of(name: LayoutName, num_joints: int, bfloat16: bool, extension: ModuleType) -> Layout:
    """Return a layout for so many joints.

    Args:
        name: ``"wgmma"`` takes bfloat16 and ``WGMMA_MAX_JOINTS`` joints, ``"cluster"`` bfloat16.
        num_joints: J.
        bfloat16: Whether weights and activations are bfloat16, else float32.
        extension: The CUDA extension, which knows the sizes.
    """
    stride = extension.ADJACENCY_STRIDE
    packers: dict[str, Callable[[Tensor], Tensor]]
    if name == "cluster":  # tensors have as many joints as the adjacency is wide
        packers = {"weight": _pack_cluster, "bias": partial(_pack_bias_by_channel, joints=stride)}
        packers |= dict.fromkeys(("own", "neighbors"), _pack_by_channel)
        return Layout(8 * extension.cluster_joint_groups(num_joints), stride, 1, stride, packers, by_phase=True)
    if name == "wgmma":
        weight = partial(_pack_wgmma, round_blocks=extension.WGMMA_ROUND_BLOCKS, ahead=extension.WGMMA_BLOCKS_AHEAD)
        packers = {"weight": weight, "own": _pack_factors, "neighbors": _pack_factors, "adjacency": _pack_adjacency}
        joints, staging = extension.wgmma_joints(num_joints), extension.WGMMA_STAGING_BYTES
        return Layout(joints, joints, extension.TILE_POSES, stride, packers, staging_bytes=staging)
    joints = 2 * extension.joint_pairs(num_joints)
    packers = {"weight": _pack_bfloat16 if bfloat16 else _pack_float32}
    return Layout(joints, joints, extension.TILE_POSES, stride, packers)


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """Return the tensor with zeros behind its last dimensions, up to these sizes."""
    padded = tensor.new_zeros(*tensor.shape[: tensor.ndim - len(sizes)], *sizes)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _pack_bfloat16(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[column block, block, lane, product, 4]``."""
    products, rows, columns = weight.shape
    # k = 16 block + 8 high + 2 t + low, n = 8 column block + g
    split = weight.view(products, rows // BLOCK, 2, 4, 2, columns // 8, 8)  # product, block, high, t, low, columns, g
    return split.permute(5, 1, 6, 3, 0, 2, 4).contiguous().to(torch.bfloat16)


def _pack_float32(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[column block, block, q, t, column, product, 4]``."""
    products, rows, columns = weight.shape
    # k = 16 block + 8 high + 2 q + low, n = 8 column block + 2 t + column
    split = weight.view(products, rows // BLOCK, 2, 4, 2, columns // 8, 4, 2)
    return split.permute(5, 1, 3, 6, 7, 0, 2, 4).contiguous()


def _pack_wgmma(weight: Tensor, round_blocks: int, ahead: int) -> Tensor:
    """Return ``[products, K, N]`` as ``[column block, block, product, warp, lane, 8]``, flat."""
    products, rows, columns = weight.shape
    rows, column_blocks = -(-rows // (BLOCK * round_blocks)) * BLOCK * round_blocks, -(-columns // 64)
    # k = 16 block + 8 high + 2 t + low, n = 64 column block + 16 warp + 8 half + g
    split = _pad(weight, rows, 64 * column_blocks).view(products, rows // BLOCK, 2, 4, 2, column_blocks, 4, 2, 8)
    packed = split.permute(5, 1, 0, 6, 8, 3, 2, 7, 4).reshape(-1).to(torch.bfloat16)
    return _pad(packed, packed.numel() + ahead * products * 64 * BLOCK)


def _pack_factors(factors: Tensor) -> Tensor:
    """Return ``[J, N]`` as ``[block, half, four joints, channel, 4]``."""
    joints, channels = factors.shape
    fours = -(-joints // 4)
    split = _pad(factors, 4 * fours, channels).view(fours, 4, channels // BLOCK, 2, 8)
    return split.permute(2, 3, 0, 4, 1).contiguous()


def _pack_adjacency(adjacency: Tensor) -> Tensor:
    """Return the transpose, padded to ``[J, stride]``: row i holds the weights of neighbour i in all joints."""
    joints, stride = adjacency.shape
    return _pad(adjacency[:, :joints].T, joints, stride)


def _pack_cluster(weight: Tensor) -> Tensor:
    """Return ``[products, K, N]`` as ``[column block, block, product, lane, 8]``."""
    products, rows, columns = weight.shape
    # k = 16 block + 8 high + 2 t + low, n = 16 column block + 8 half + g
    split = weight.view(products, rows // BLOCK, 2, 4, 2, columns // BLOCK, 2, 8)
    return split.permute(5, 1, 0, 7, 3, 2, 6, 4).to(torch.bfloat16)


def _pack_by_channel(factors: Tensor) -> Tensor:
    """Return ``[J, N]`` as ``[N, J]``."""
    return factors.T


def _pack_bias_by_channel(bias: Tensor, joints: int) -> Tensor:
    """Return ``[N]`` or ``[J, N]`` as ``[N, J]``."""
    return bias.expand(joints, -1).T
