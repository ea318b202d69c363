"""Rows: the rank of a person in the image, the id that seeds its noise, and which joints count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.types import Detections


def frame_ids(image_ids: Sequence[str], person: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the 64-bit number that seeds the noise of each row, ``[B]`` int64 (the bit pattern of a uint64).

    It is the first 8 bytes, little-endian, of BLAKE2b over the image id as text, a NUL, and the person as text.

    Example:
        >>> frame_ids(["7"], [0])
        array([8929030650072864538])
    """
    # JSON can hold half a surrogate pair, which strict UTF-8 refuses.
    digests = [
        hashlib.blake2b(f"{image}\0{int(number)}".encode("utf-8", "surrogatepass")).digest()[:8]
        for image, number in zip(image_ids, person, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def rank_people(frame: np.ndarray, scores: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the rank of each row in its frame by (score descending, keypoints lexicographically).

    Args:
        frame: Frame of each row, ``[B]``.
        scores: Score of each row, ``[B]``; NaN, for none, comes last.
        points: Keypoints ``[B, J, 3]``; NaN, for missing, comes first.

    Returns:
        Ranks ``[B]`` int64.
    """
    person = np.zeros(len(frame), dtype=np.int64)
    _, inverse, counts = np.unique(frame, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[inverse] > 1)  # most files have one person an image, and nothing to sort
    if len(several) == 0:
        return person
    columns = np.nan_to_num(points[several].reshape(len(several), -1), nan=-np.inf).T  # [3 J, B]
    falling = -np.where(np.isnan(scores[several]), -np.inf, scores[several])
    order = np.lexsort((*columns[::-1], falling, frame[several]))  # the last key counts first
    ordered = frame[several][order]
    first_of_frame = np.searchsorted(ordered, ordered)
    person[several[order]] = np.arange(len(ordered)) - first_of_frame
    return person


def apply_threshold(
    points: np.ndarray, detections: Detections, threshold: float | None, name: str
) -> tuple[np.ndarray, float | None, int, tuple[str, ...]]:
    """Make joints below the threshold missing, where confidences are scores in 0..1.

    The threshold is for joints, not for people: a lifter can use the good joints of a doubtful person, but not a bad
    joint of a certain one. A person is left out only when no joint is left.

    Returns:
        Points with confidences in 0..1, the threshold that was applied, how many joints it took, and notes.

    Raises:
        InputError: If no joint is left.
    """
    confidence = points[..., 2]
    highest = float(confidence.max())
    if detections.confidence == "flag":
        notes: tuple[str, ...] = ("the third value is COCO's visibility flag: every joint above 0 counts as present",)
    elif detections.confidence == "none":
        notes = ("no confidence in the file: every joint that is there counts as 1",)
    elif highest > 1 + 1e-6:
        notes = (f"confidences reach {highest:.3g}, so they are no scores in 0..1: no threshold, and capped at 1",)
    else:
        # In float32, so that a joint exactly on the threshold is still on it when a float32 file is read back.
        below = (confidence > 0) & (confidence.astype(np.float32) < np.float32(threshold or 0.0))
        kept = np.where(below[..., None], np.array([np.nan, np.nan, 0.0]), points)
        if not (kept[..., 2] > 0).any():
            raise InputError(
                f"{name}: all joints are below the score threshold {threshold:g} (the highest has {highest:.3g})"
            )
        return kept, threshold, int(below.sum()), ()
    # Models learn confidences in 0..1; flags and heatmap peaks are larger.
    capped = points.copy()
    capped[..., 2] = np.minimum(confidence, 1.0)
    return capped, None, 0, notes
