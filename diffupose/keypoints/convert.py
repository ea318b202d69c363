"""From a detector's joints to those of a skeleton."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.layouts import H36M, H36M_WITHOUT_NECK, HUMANEVA, Layout, find_layout
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15, NECK, Skeleton, h36m_joints

HeadRule = Literal["extrapolated", "mean_eyes"]
HEAD_RULES: tuple[str, ...] = get_args(HeadRule)

# From the thorax to the middle of nose and ears, and to the middle of the ears: with these factors joints 9 and 10
# fall where the bundled model's training joints are (throat or chin, and the hairline).
_NECK_FACTOR = 0.70
_HEAD_FACTOR = 1.14
# The hairline is about 0.26 m from the thorax and the top of the head about 0.29 m.
_HEAD_TOP_FACTOR = 0.90


def convert_keypoints(
    keypoints: np.ndarray, layout: str, skeleton: Skeleton, *, head: HeadRule = "extrapolated"
) -> np.ndarray:
    """Return the keypoints in the joints of ``skeleton``.

    Pelvis, spine, thorax, neck and head are derived where the detector has none: pelvis = middle of the hips,
    thorax = middle of the shoulders, spine = middle of the two. A derived joint has the lowest confidence of its
    parents and is missing if one of them is; of ears (or eyes) one is enough, since in profile the other one is hidden
    behind it. ``"extrapolated"`` puts neck at thorax + 0.70 (mean(nose, middle of ears) - thorax) and head at
    thorax + 1.14 (middle of ears - thorax); ``"mean_eyes"`` is the usual rule of the field: neck at the nose, head
    between the eyes (for HALPE-26 at its head top).

    Args:
        keypoints: x, y in pixels and confidence, shape ``[..., J_source, 3]``. NaN or a confidence that is not
            positive means missing.
        layout: Joint order of ``keypoints``: a key of ``LAYOUTS``.
        skeleton: ``H36M_17``, ``H36M_16`` or ``HUMANEVA_15``.
        head: How neck and head are derived.

    Returns:
        Keypoints of shape ``[..., J, 3]``, float32 for float32 and else float64; missing joints are NaN, NaN, 0.

    Raises:
        InputError: If the shape does not fit the layout, or the layout does not convert to the skeleton.

    Example:
        >>> pose = np.full((16, 3), 5.0)
        >>> convert_keypoints(pose, "h36m_16", H36M_17)[9].tolist()  # the joint that 16 lack is missing
        [nan, nan, 0.0]
    """
    source = find_layout(layout)
    if source is None:
        raise InputError("layout must be named for a conversion, got 'auto'")
    if head not in HEAD_RULES:
        raise InputError(f"head must be one of {', '.join(HEAD_RULES)}, got {head!r}")
    given = np.asarray(keypoints)
    if given.dtype.kind not in "iuf" or given.ndim < 2 or given.shape[-2:] != (source.num_joints, 3):
        raise InputError(
            f"keypoints must be numbers of shape [..., {source.num_joints}, 3] for layout {source.name}, "
            f"got {given.dtype} {given.shape}"
        )
    points = mark_missing(given.astype(np.float64))
    converted = _to_skeleton(points, source, skeleton, head)
    return converted.astype(np.float32 if given.dtype == np.float32 else np.float64)


def check_convertible(layout: Layout, skeleton: Skeleton) -> None:
    """Raise an InputError if ``layout`` does not convert to ``skeleton``."""
    if skeleton.name not in (H36M_17.name, H36M_16.name, HUMANEVA_15.name):
        raise InputError(f"skeleton must be h36m_17, h36m_16 or humaneva_15, got {skeleton.name!r}")
    if (layout is HUMANEVA) != (skeleton.name == HUMANEVA_15.name):
        raise InputError(
            f"layout {layout.name} ({layout.num_joints} joints) does not convert to the {skeleton.num_joints} joints "
            f"of {skeleton.name}: HumanEva's joints are marked differently"
        )


def mark_missing(points: np.ndarray) -> np.ndarray:
    """Return a copy of ``points [..., J, 3]`` where missing joints are NaN, NaN, 0."""
    # A comparison with NaN is false: a NaN confidence is missing too.
    present = ~np.isnan(points[..., :2]).any(axis=-1) & (points[..., 2] > 0)
    return np.where(present[..., None], points, np.array([np.nan, np.nan, 0.0]))


def _to_skeleton(points: np.ndarray, layout: Layout, skeleton: Skeleton, head: str) -> np.ndarray:
    """Convert points that are marked already."""
    check_convertible(layout, skeleton)
    if layout.joint_names == skeleton.joint_names:
        return points
    if layout is H36M_WITHOUT_NECK:
        missing = np.array([np.nan, np.nan, 0.0])
        return np.insert(points, NECK, missing, axis=-2)  # [..., 17, 3]
    if layout is not H36M:
        points = _to_h36m(points, layout, head)  # [..., 17, 3]
    return np.take(points, h36m_joints(skeleton.num_joints), axis=-2)


def _to_h36m(points: np.ndarray, layout: Layout, head_rule: str) -> np.ndarray:
    """Derive the 17 joints of Human3.6M from a detector's."""

    def joint(name: str) -> np.ndarray:
        return points[..., layout.index(name), :]

    def has(name: str) -> bool:
        return name in layout.joint_names

    pelvis = _mean(joint("LHip"), joint("RHip"))
    pelvis = _first(joint("MidHip"), pelvis) if has("MidHip") else pelvis
    thorax = _mean(joint("LShoulder"), joint("RShoulder"))
    thorax = _first(joint("Neck"), thorax) if has("Neck") else thorax
    eyes = _either(joint("LEye"), joint("REye"))
    ears = _either(joint("LEar"), joint("REar"))
    if head_rule == "mean_eyes":
        neck, head = joint("Nose"), joint("HeadTop") if has("HeadTop") else eyes
    else:
        neck = _along(thorax, _mean(joint("Nose"), ears), _NECK_FACTOR)
        head = _along(thorax, ears, _HEAD_FACTOR)
        if has("HeadTop"):
            # The ears come first, so that a picture gives the same head for each detector. Joint 10 lies a few
            # centimetres below the top of the head, so the top is used only if no ear is there.
            head = _first(head, _along(thorax, joint("HeadTop"), _HEAD_TOP_FACTOR))
    right_leg, left_leg = ([joint(side + name) for name in ("Hip", "Knee", "Ankle")] for side in "RL")
    left_arm, right_arm = ([joint(side + name) for name in ("Shoulder", "Elbow", "Wrist")] for side in "LR")
    trunk = [_mean(pelvis, thorax), thorax, neck, head]
    return np.stack([pelvis, *right_leg, *left_leg, *trunk, *left_arm, *right_arm], axis=-2)  # [..., 17, 3]


def _along(start: np.ndarray, target: np.ndarray, factor: float) -> np.ndarray:
    """Return start + factor (target - start), missing if one of them is."""
    point: np.ndarray = start + factor * (target - start)  # NaN spreads by itself
    point[..., 2] = np.minimum(start[..., 2], target[..., 2])
    return point


def _mean(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the middle of two points, missing if one of them is."""
    return _along(first, second, 0.5)


def _first(preferred: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Return ``preferred`` where it is present and ``fallback`` elsewhere."""
    return np.where(preferred[..., 2:] > 0, preferred, fallback)


def _either(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the middle of two points, or the one that is present."""
    return _first(_mean(first, second), _first(first, second))
