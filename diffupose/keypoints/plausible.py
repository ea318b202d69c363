"""Limits of what can be the 2D pose of a person in an image, the same for files and for the Lifter."""

from __future__ import annotations

import numpy as np

from diffupose.skeleton import Skeleton

# No image is larger: a larger coordinate is a mistake.
MAX_COORDINATE = 1e6
MAX_NORMALIZED = 1.5
# Farther outside the image than this many longer sides, the size or the keypoints belong to something else.
SIDES_OUTSIDE = 3.0
# The third number is a confidence or a heatmap's peak: a larger one is a depth.
MAX_CONFIDENCE = 1e3
# 100,000 views from all sides, with detector noise and up to half of the joints missing, were measured. The largest box
# was 3.2 times as large as without its farthest joint, and 3.1 times as large as without two. A foot that is detected a
# body length below a picture of head and arms gives 4.9.
_STRETCH = 5.0
# Detectors do not give these joints: they are means of others, and move with a stray one.
_DERIVED = ("Hip", "Pelvis", "Spine", "Thorax", "Neck/Nose")

_FEW, _POINT = "more than half of the joints missing", "all joints at one point"
_SMALL = f"all joints within ±{MAX_NORMALIZED:g}: normalised already"
_STRAY = "a joint too far from all others"


def why_unusable(keypoints: np.ndarray, skeleton: Skeleton) -> list[str | None]:
    """Return for each row of ``keypoints [B, J, 2]`` (NaN: missing) why it cannot be lifted, or None if it can.

    A row must have half of its joints, at more than one point, in pixels. No joint, nor two of them, may be so far away
    that the box of the person would be 5 times as large as without: normalisation would shrink the others to a point.
    """
    present = ~np.isnan(keypoints).any(axis=-1)  # [B, J]
    size, largest = _box_side(keypoints), np.abs(np.nan_to_num(keypoints)).max(axis=(1, 2), initial=0.0)  # [B]
    measured = [joint for joint, name in enumerate(skeleton.joint_names) if name not in _DERIVED]
    limbs = keypoints[:, measured]
    stray = _stretched(keypoints, 2) | (_stretched(limbs, 1) & (present[:, measured].sum(axis=1) > 3))
    problems: list[str | None] = [None] * len(keypoints)
    # If several apply, the last one is kept.
    for text, rows in (
        (_STRAY, stray),
        (_SMALL, largest <= MAX_NORMALIZED),
        (_POINT, size <= 1e-3),
        (_FEW, 2 * present.sum(axis=1) < skeleton.num_joints),
    ):
        for row in np.flatnonzero(rows):
            problems[row] = text
    return problems


def _box_side(points: np.ndarray) -> np.ndarray:
    """Return the longer side of the box of ``points [B, J, 2]``, 0 where there is none."""
    missing = np.isnan(points)
    low = np.where(missing, np.inf, points).min(axis=1, initial=np.inf)
    high = np.where(missing, -np.inf, points).max(axis=1, initial=-np.inf)
    side: np.ndarray = np.maximum(high - low, 0.0).max(axis=1)  # [B]
    return side


def _stretched(points: np.ndarray, count: int) -> np.ndarray:
    """Return ``[B]`` whether the ``count`` joints farthest from the middle one stretch the box out of proportion."""
    missing = np.isnan(points).any(axis=-1)  # [B, J]
    # The median, since one or two strays cannot move it far; sorting puts NaN last.
    middle = np.sort(points, axis=1)[np.arange(len(points)), np.maximum((~missing).sum(axis=1) - 1, 0) // 2]
    distance = np.where(missing, -1.0, np.abs(points - middle[:, None]).max(axis=-1))
    farthest = np.argsort(-distance, axis=1, kind="stable")[:, :count]
    rest = points.copy()
    np.put_along_axis(rest, farthest[..., None], np.nan, axis=1)
    stretched: np.ndarray = _box_side(points) > _STRETCH * _box_side(rest)
    return stretched


def outside_image(points: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Return ``[B, J]`` which of ``points [B, J, 2]`` lie absurdly far outside of images of ``image_size [B, 2]``."""
    margin = SIDES_OUTSIDE * image_size.max(axis=1)[:, None, None]
    outside: np.ndarray = ((points < -margin) | (points > image_size[:, None] + margin)).any(axis=-1)  # NaN is not
    return outside
