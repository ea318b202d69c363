"""Skeletons: the joints, the bones between them, and which joints are left and right of the person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Normalization = Literal["row", "symmetric"]


@dataclass(frozen=True)
class Skeleton:
    """A tree of joints. Joint 0 is the root; ``parents[0]`` is -1.

    Attributes:
        name: Short name, stored in checkpoints.
        joint_names: One name per joint.
        parents: Parent of each joint, -1 for the root.
        joints_left: Joints on the left of the person, paired with ``joints_right`` element by element.
        joints_right: Joints on the right of the person.
    """

    name: str
    joint_names: tuple[str, ...]
    parents: tuple[int, ...]
    joints_left: tuple[int, ...]
    joints_right: tuple[int, ...]

    @property
    def num_joints(self) -> int:
        """Number of joints J."""
        return len(self.parents)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Bones as (parent, child) pairs."""
        return tuple((parent, child) for child, parent in enumerate(self.parents) if parent >= 0)

    @property
    def flip_permutation(self) -> tuple[int, ...]:
        """Index list that swaps left and right: ``mirrored = pose[..., flip_permutation, :]`` with x negated."""
        order = list(range(self.num_joints))
        for left, right in zip(self.joints_left, self.joints_right, strict=True):
            order[left], order[right] = right, left
        return tuple(order)

    def adjacency(self, normalization: Normalization = "row") -> np.ndarray:
        """Return the adjacency matrix with self-loops, shape ``[J, J]``, float64.

        ``"row"`` divides each row of the neighbour matrix by its degree and sets the diagonal to 1, as the released
        network does (each row sums to 2 and the matrix is not symmetric). ``"symmetric"`` is the paper's
        ``D^-1/2 (A + I) D^-1/2`` (its reference [14], eq. 6).
        """
        neighbors = np.zeros((self.num_joints, self.num_joints))
        for parent, child in self.edges:
            neighbors[parent, child] = neighbors[child, parent] = 1.0
        if normalization == "row":
            degree = neighbors.sum(axis=1, keepdims=True)
            matrix = np.divide(neighbors, degree, out=np.zeros_like(neighbors), where=degree > 0)
            np.fill_diagonal(matrix, 1.0)
            return matrix
        if normalization == "symmetric":
            with_self = neighbors + np.eye(self.num_joints)
            scale = 1.0 / np.sqrt(with_self.sum(axis=1))
            return scale[:, None] * with_self * scale[None, :]
        raise ValueError(f'normalization must be "row" or "symmetric", got {normalization!r}')


H36M_17 = Skeleton(
    name="h36m_17",
    joint_names=(
        "Hip", "RHip", "RKnee", "RFoot", "LHip", "LKnee", "LFoot", "Spine", "Thorax", "Neck/Nose", "Head",
        "LShoulder", "LElbow", "LWrist", "RShoulder", "RElbow", "RWrist",
    ),
    parents=(-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15),
    joints_left=(4, 5, 6, 11, 12, 13),
    joints_right=(1, 2, 3, 14, 15, 16),
)  # fmt: skip

# Neck/Nose: the joint of 17 that 16 lack.
NECK = 9


def h36m_joints(num_joints: int) -> list[int]:
    """Return which of the joints of ``H36M_17`` a skeleton of 17 or 16 has: all, or all but Neck/Nose.

    Raises:
        ValueError: For another number.
    """
    if num_joints not in (16, 17):
        raise ValueError(f"the data has the 17 joints of Human3.6M: the model must have 16 or 17, got {num_joints}")
    return [joint for joint in range(17) if num_joints == 17 or joint != NECK]


# Human3.6M without Neck/Nose: what the published HRNet detections and the released checkpoint use.
H36M_16 = Skeleton(
    name="h36m_16",
    joint_names=tuple(H36M_17.joint_names[joint] for joint in h36m_joints(16)),
    parents=(-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 8, 10, 11, 8, 13, 14),
    joints_left=(4, 5, 6, 10, 11, 12),
    joints_right=(1, 2, 3, 13, 14, 15),
)

HUMANEVA_15 = Skeleton(
    name="humaneva_15",
    joint_names=(
        "Pelvis", "Thorax", "LShoulder", "LElbow", "LWrist", "RShoulder", "RElbow", "RWrist",
        "LHip", "LKnee", "LAnkle", "RHip", "RKnee", "RAnkle", "Head",
    ),
    parents=(-1, 0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 0, 11, 12, 1),
    joints_left=(2, 3, 4, 8, 9, 10),
    joints_right=(5, 6, 7, 11, 12, 13),
)  # fmt: skip

SKELETONS = {skeleton.name: skeleton for skeleton in (H36M_17, H36M_16, HUMANEVA_15)}


def skeleton_by_num_joints(num_joints: int) -> Skeleton:
    """Return the skeleton with this many joints (17, 16 or 15).

    Raises:
        ValueError: If there is none.
    """
    for skeleton in SKELETONS.values():
        if skeleton.num_joints == num_joints:
            return skeleton
    raise ValueError(f"num_joints must be 15, 16 or 17, got {num_joints}")
