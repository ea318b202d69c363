"""What a keypoint file gives: ``Keypoints`` for callers, ``Detections`` from the reader of one format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffupose.keypoints.layouts import Layout
from diffupose.skeleton import Skeleton


@dataclass(frozen=True)
class Keypoints:
    """People found in images, one row each, in the joints of ``skeleton``, sorted by (frame, person).

    Attributes:
        keypoints: Pixels x, y and confidence in 0..1, shape ``[B, J, 3]``, float32; missing joints are NaN, NaN, 0.
        frame: Rank of the image among all known images in natural order (2 before 10), ``[B]`` int64.
        person: Rank inside the image by (score descending, keypoints lexicographically), ``[B]`` int64.
        image_id: Image ids as text, ``[B]``.
        frame_ids: Bit pattern of the uint64 that seeds a row's noise, ``[B]`` int64; see ``frame_ids()``.
        image_size: Width and height in pixels, ``[B, 2]`` float64, or None when unknown.
        skeleton: The skeleton of ``keypoints``.
        source_format: ``"coco_results"``, ``"coco_annotations"``, ``"openpose"``, ``"npy"``, ``"npz"`` or ``"lift"``.
        source_layout: Name of the joint order in the file.
        num_source_joints: Joints per person in the file.
        num_frames: Images known, with those that show nobody.
        num_empty_frames: Images without a row.
        score_threshold: The threshold applied to the confidence of each joint; None if scores were not usable.
        num_below_threshold: Joints of the file that are missing because they were below it.
        notes: What was assumed, in words.
    """

    keypoints: np.ndarray
    frame: np.ndarray
    person: np.ndarray
    image_id: np.ndarray
    frame_ids: np.ndarray
    image_size: np.ndarray | None
    skeleton: Skeleton
    source_format: str
    source_layout: str
    num_source_joints: int
    num_frames: int
    num_empty_frames: int
    score_threshold: float | None
    num_below_threshold: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ImageEntry:
    """One entry of a COCO ``images`` list; ``size`` is (w, h) in pixels."""

    image_id: str
    file_name: str | None
    size: tuple[float, float] | None


@dataclass(frozen=True)
class Detections:
    """What one reader found, with the joints and rows of the file.

    Attributes:
        points: x, y and confidence as they stand in the file, ``[B, J, 3]`` float64.
        scores: Score of each person, ``[B]`` float64, NaN for none.
        image_ids: Image id of each row.
        layout: Joint order of ``points``.
        source_format: See ``Keypoints``.
        describe: Says in words where a row stands in the file.
        confidence: Whether the third value is a score, a COCO visibility flag, or was not in the file.
        known_images: Ids of further images, which may show nobody.
        images: The file's own ``images`` list.
        image_size: The file's own sizes ``[B, 2]``.
        frame: The file's own frame numbers ``[B]``.
        person: The file's own person numbers ``[B]``.
        notes: What was assumed.
    """

    points: np.ndarray
    scores: np.ndarray
    image_ids: list[str]
    layout: Layout
    source_format: str
    describe: Callable[[int], str]
    confidence: Literal["score", "flag", "none"] = "score"
    known_images: tuple[str, ...] = ()
    images: tuple[ImageEntry, ...] = ()
    image_size: np.ndarray | None = None
    frame: np.ndarray | None = None
    person: np.ndarray | None = None
    notes: tuple[str, ...] = ()
