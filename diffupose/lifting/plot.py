"""A picture of 2D keypoints and their 3D hypotheses, seen from the front and from the side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from diffupose.files import atomic_path
from diffupose.skeleton import Skeleton

SUFFIXES = (".png", ".pdf", ".svg")

_MAX_LABEL = 24  # characters
_MAX_EXTENT = 10.0  # metres from the root: beyond, the unit is wrong


def plot_poses(
    path: str | os.PathLike[str],
    keypoints: ArrayLike,
    hypotheses: ArrayLike,
    poses_3d: ArrayLike,
    skeleton: Skeleton,
    *,
    labels: Sequence[str] | None = None,
    max_people: int = 4,
) -> None:
    """Draw one row per person: the input keypoints, and all hypotheses from the front and from the side.

    Hypotheses are thin and translucent, the aggregate is thick. The person's left is blue, the right orange. A metre
    has one length in the whole picture, and the keypoints are drawn at the size of the front view. Hypotheses differ
    mostly in depth, so they spread in the side view.

    Args:
        path: The picture to write, ``.png``, ``.pdf`` or ``.svg``. It appears whole or not at all.
        keypoints: Shape ``[B, J, 2]`` or, with confidence, ``[B, J, 3]``, in pixels. A joint is missing, and not
            drawn, where a coordinate is NaN or the confidence is NaN or not positive.
        hypotheses: Shape ``[B, H, J, 3]``, root-relative, in metres, camera frame (x right, y down, z forward).
        poses_3d: The aggregate of the hypotheses, shape ``[B, J, 3]``, same frame and unit.
        skeleton: The joints and bones.
        labels: One name per row of ``keypoints``, cut to its end where it is long; default ``"pose 0"``, ``"pose 1"``
            and so on where there are several.
        max_people: The most rows. Poses that hold NaN are left out; a footer counts the poses that are not shown.

    Raises:
        ValueError: If the suffix is not supported, a shape does not fit, ``max_people`` is below 1, no pose is finite
            or one is too large to be in metres.
        FileNotFoundError: If the folder of ``path`` does not exist.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {str(target)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} of {str(target)!r} does not exist")
    if max_people < 1:
        raise ValueError(f"max_people must be at least 1, got {max_people}")
    keypoints, hypotheses, poses_3d = _checked(keypoints, hypotheses, poses_3d, skeleton)
    count = len(poses_3d)
    if labels is None:
        labels = [f"pose {index}" for index in range(count)] if count > 1 else [""] * count
    if len(labels) != count:
        raise ValueError(f"labels must have one entry per pose, {count}, got {len(labels)}")

    usable = np.flatnonzero(np.isfinite(poses_3d).all((1, 2)) & np.isfinite(hypotheses).all((1, 2, 3)))
    if not len(usable):
        raise ValueError(f"poses_3d and hypotheses must hold a finite pose to draw, got none among {count}")
    shown = usable[:max_people]
    farthest = float(np.abs(poses_3d[shown]).max())
    if farthest > _MAX_EXTENT:
        raise ValueError(f"poses_3d must be root-relative and in metres, got a joint {farthest:.4g} from the root")
    # Loading matplotlib takes long: wrong arguments were reported before.
    from diffupose.lifting.plot_page import DPI, Row, draw_page

    rows = [
        Row(_shorten(str(labels[b])), _spread_note(hypotheses[b], skeleton), keypoints[b], hypotheses[b], poses_3d[b])
        for b in shown
    ]
    footer = f"{len(shown)} of {count} shown" if len(shown) < count else ""
    if len(usable) < count:
        footer += f", {count - len(usable)} without a pose"

    figure = draw_page(rows, skeleton, footer)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=DPI, facecolor="white")


def depth_spread(hypotheses: np.ndarray, skeleton: Skeleton) -> tuple[float, str]:
    """Return the standard deviation of depth over the hypotheses, and where it was taken.

    It is the root of the mean unbiased variance of z at the wrists, or at all joints but the root where the skeleton
    names no wrist.

    Args:
        hypotheses: Shape ``[H, J, 3]``, in metres, H at least 2.
        skeleton: Names the joints.

    Returns:
        Millimetres, and ``"at the wrists"`` or ``"over all joints"``.
    """
    joints = [joint for joint, name in enumerate(skeleton.joint_names) if name.lower().endswith("wrist")]
    place = "at the wrists" if joints else "over all joints"
    variance = hypotheses[:, joints or slice(1, None), 2].var(axis=0, ddof=1)
    return 1000.0 * float(np.sqrt(variance.mean())), place


def _spread_note(hypotheses: np.ndarray, skeleton: Skeleton) -> str:
    """Return what stands above the side view, where the hypotheses spread."""
    if len(hypotheses) < 2:
        return ""
    spread, place = depth_spread(hypotheses, skeleton)
    return f"depth sd {place} {spread:.0f} mm"


def _checked(
    keypoints: ArrayLike, hypotheses: ArrayLike, poses_3d: ArrayLike, skeleton: Skeleton
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keypoints ``[B, J, 2]`` with NaN where missing, hypotheses and poses, as float64 of matching shapes."""
    num_joints = skeleton.num_joints
    points = np.array(keypoints, dtype=np.float64)
    samples = np.asarray(hypotheses, dtype=np.float64)
    poses = np.asarray(poses_3d, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (num_joints, 3):
        raise ValueError(f"poses_3d must have shape [B, {num_joints}, 3], got {poses.shape}")
    count = len(poses)
    if points.ndim != 3 or points.shape[:2] != (count, num_joints) or points.shape[2] not in (2, 3):
        raise ValueError(f"keypoints must have shape [{count}, {num_joints}, 2 or 3], got {points.shape}")
    if samples.ndim != 4 or samples.shape[1] < 1 or samples.shape[::2] != (count, num_joints) or samples.shape[3] != 3:
        raise ValueError(f"hypotheses must have shape [{count}, H, {num_joints}, 3], H >= 1, got {samples.shape}")
    missing = ~np.isfinite(points[..., :2]).all(-1)
    if points.shape[2] == 3:
        missing |= ~(points[..., 2] > 0)
    points = points[..., :2]  # [B, J, 2]
    points[missing] = np.nan
    return points, samples, poses


def _shorten(label: str) -> str:
    """Return the label in one line that fits beside a heading; of a longer one the end, where file names differ."""
    label = " ".join(label.split())
    return label if len(label) <= _MAX_LABEL else "\N{HORIZONTAL ELLIPSIS}" + label[1 - _MAX_LABEL :]
