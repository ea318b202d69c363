"""Augmentation of motion capture: limbs of one person on another (as evolutionary crossover, Li et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffupose.camera import turn_about_vertical
from diffupose.skeleton import H36M_17

# Joints whose bones (from their parents) move together, and the pair whose horizontal line says where front is.
_LIMBS = (((12, 13), (14, 11)), ((15, 16), (14, 11)), ((2, 3, 5, 6), (1, 4)))


def exchange_limbs(positions: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Return poses whose limbs have the directions, relative to the trunk, of other people of the batch.

    The left arm, the right arm and the legs are each exchanged with the given probability. Bones keep their lengths;
    directions keep their angle to the vertical.

    Args:
        positions: World frame (z up), metres, ``[B, 17, 3]``.
        generator: Source of the draws, on the device of the positions.
        probability: Of each exchange, 0 to 1.
    """
    batch, device = positions.shape[0], positions.device
    result = positions.clone()
    for joints, (right, left) in _LIMBS:
        partner = torch.randperm(batch, generator=generator, device=device)
        line = positions[:, left, :2] - positions[:, right, :2]
        heading = torch.atan2(line[:, 1], line[:, 0])  # [B]
        turn = heading - heading[partner]  # from the partner's front to one's own
        exchanged = torch.rand(batch, generator=generator, device=device) < probability
        for joint in joints:
            parent = H36M_17.parents[joint]
            bone = positions[:, joint] - positions[:, parent]  # [B, 3]
            other = bone[partner]
            turned = turn_about_vertical(other, turn)
            length = bone.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            bone = torch.where(exchanged[:, None], length * turned, bone)
            result[:, joint] = result[:, parent] + bone
    return result
