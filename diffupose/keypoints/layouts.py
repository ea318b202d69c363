"""Joint orders that detectors write: names, counts and left-right pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffupose.errors import InputError
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15


@dataclass(frozen=True)
class Layout:
    """A named joint order.

    Attributes:
        name: The name that ``layout=`` takes.
        joint_names: One name per joint; ``L`` and ``R`` in front mean the person's left and right.
    """

    name: str
    joint_names: tuple[str, ...]

    @property
    def num_joints(self) -> int:
        """Number of joints J."""
        return len(self.joint_names)

    @property
    def flip_permutation(self) -> tuple[int, ...]:
        """Index list that swaps left and right."""
        swap = {"L": "R", "R": "L"}
        index = {name: joint for joint, name in enumerate(self.joint_names)}
        return tuple(
            index.get(swap.get(name[0], name[0]) + name[1:], joint) for joint, name in enumerate(self.joint_names)
        )

    def index(self, name: str) -> int:
        """Return the number of the joint called ``name``."""
        return self.joint_names.index(name)


_COCO = (
    "Nose", "LEye", "REye", "LEar", "REar", "LShoulder", "RShoulder", "LElbow", "RElbow", "LWrist", "RWrist",
    "LHip", "RHip", "LKnee", "RKnee", "LAnkle", "RAnkle",
)  # fmt: skip
_OPENPOSE_TRUNK = ("Nose", "Neck", "RShoulder", "RElbow", "RWrist", "LShoulder", "LElbow", "LWrist")
_OPENPOSE_LEGS = ("RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle")
_OPENPOSE_HEAD = ("REye", "LEye", "REar", "LEar")

COCO = Layout("coco", _COCO)
HALPE26 = Layout(
    "halpe26",
    (*_COCO, "HeadTop", "Neck", "MidHip", "LBigToe", "RBigToe", "LSmallToe", "RSmallToe", "LHeel", "RHeel"),
)
OPENPOSE_BODY25 = Layout(
    "openpose_body25",
    (
        *_OPENPOSE_TRUNK, "MidHip", *_OPENPOSE_LEGS, *_OPENPOSE_HEAD,
        "LBigToe", "LSmallToe", "LHeel", "RBigToe", "RSmallToe", "RHeel",
    ),
)  # fmt: skip
OPENPOSE_COCO18 = Layout("openpose_coco18", (*_OPENPOSE_TRUNK, *_OPENPOSE_LEGS, *_OPENPOSE_HEAD))
H36M = Layout("h36m", H36M_17.joint_names)
H36M_WITHOUT_NECK = Layout("h36m_16", H36M_16.joint_names)
HUMANEVA = Layout("humaneva", HUMANEVA_15.joint_names)

LAYOUTS = {
    layout.name: layout
    for layout in (H36M, H36M_WITHOUT_NECK, COCO, OPENPOSE_BODY25, OPENPOSE_COCO18, HALPE26, HUMANEVA)
}


def find_layout(layout: str | None) -> Layout | None:
    """Return the layout of this name, or None for None and ``"auto"``.

    Raises:
        InputError: If there is no such layout.
    """
    if layout is None or layout == "auto":
        return None
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of auto, {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout]


def layout_by_count(count: int, candidates: Sequence[Layout], layout: Layout | None, where: str) -> Layout:
    """Return ``layout`` if it has ``count`` joints, or else the candidate that has.

    Raises:
        InputError: If the count does not fit; the message begins with ``where``.
    """
    if layout is not None:
        if layout.num_joints != count:
            raise InputError(f"{where}: layout {layout.name} has {layout.num_joints} joints, got {count}")
        return layout
    for candidate in candidates:
        if candidate.num_joints == count:
            return candidate
    expected = ", ".join(f"{candidate.num_joints} ({candidate.name})" for candidate in candidates)
    raise InputError(f"{where}: the number of joints must be one of {expected}, got {count}")
