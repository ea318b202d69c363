"""The function that reads keypoint files; it recognises the format by the content, not by the name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.arrays import NPY_MAGIC, ZIP_MAGIC, read_arrays
from diffupose.keypoints.checks import (
    SUPPORTED,
    check_confidence,
    check_points,
    image_size_pair,
    load_json,
    parse_json,
    short,
)
from diffupose.keypoints.coco import read_coco_annotations, read_coco_results
from diffupose.keypoints.convert import HEAD_RULES, HeadRule, check_convertible, convert_keypoints, mark_missing
from diffupose.keypoints.images import match_images, natural_frames, read_images
from diffupose.keypoints.layouts import H36M, H36M_WITHOUT_NECK, Layout, find_layout
from diffupose.keypoints.openpose import read_openpose, read_openpose_folder
from diffupose.keypoints.people import apply_threshold, frame_ids, rank_people
from diffupose.keypoints.types import Detections, Keypoints
from diffupose.skeleton import H36M_17, Skeleton


def read_keypoints(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    skeleton: Skeleton = H36M_17,
    image_size: Sequence[float] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    score_threshold: float | None = 0.3,
    head: HeadRule = "extrapolated",
) -> Keypoints:
    """Return the people of a keypoint file, in the joints of ``skeleton``.

    The result does not depend on the order of the file: images are ranked in natural order, people inside an image by
    score and keypoints. People with no joint of the skeleton left are left out; their images count as frames.

    Args:
        path: COCO results or annotations, an OpenPose file or folder, .npy, .npz, or what ``lift`` wrote.
        layout: Joint order of the file (a key of ``LAYOUTS``); None or ``"auto"`` decides by format and joint count.
        skeleton: What to convert to.
        image_size: (width, height) in pixels, the same for all images.
        annotations: A COCO file whose ``images`` list has the sizes; ids, or else file names, must match.
        score_threshold: Joints with a lower confidence are missing, where confidences lie in 0..1; None for none.
        head: See ``convert_keypoints``.

    Returns:
        The keypoints, with what was assumed in ``notes``.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the content is not what it should be; the message names the place.
    """
    name = os.fspath(path)
    wanted = find_layout(layout)
    if head not in HEAD_RULES:
        raise InputError(f"head must be one of {', '.join(HEAD_RULES)}, got {head!r}")
    if image_size is not None and annotations is not None:
        raise InputError("give image_size or annotations, not both")
    pair = None if image_size is None else image_size_pair(image_size, "image_size")
    threshold = _checked_threshold(score_threshold)

    detections = _load(Path(path), wanted)
    try:
        check_convertible(detections.layout, skeleton)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    size, known = _sizes(detections, pair, annotations, name)
    check_confidence(detections, name)
    points = mark_missing(detections.points)  # [B, J_source, 3]
    check_points(points, size, detections, name)

    frame, num_frames = detections.frame, 0
    if frame is None:
        frame, num_frames = natural_frames(detections.image_ids, known)
    else:
        num_frames = int(frame.max()) + 1

    # People without any joint in the file are left out first. Those whose joints all fall below the threshold keep
    # their rank, so that the threshold changes neither the numbers nor the noise of others.
    rows = np.flatnonzero((points[..., 2] > 0).any(axis=-1))
    points, frame = points[rows], frame[rows]
    if detections.person is None:
        person = rank_people(frame, detections.scores[rows], points)
    else:
        person = detections.person[rows]

    points, threshold, below, score_notes = apply_threshold(points, detections, threshold, name)
    converted = convert_keypoints(points, detections.layout.name, skeleton, head=head)  # [B, J, 3]
    usable: np.ndarray = np.any(converted[..., 2] > 0, axis=-1)  # [B]
    if not usable.any():
        raise InputError(f"{name}: no person has a joint from which one of {skeleton.name} follows")

    order = np.lexsort((person, frame))
    order = order[usable[order]]
    ids = [detections.image_ids[row] for row in rows[order]]
    dropped = len(detections.points) - len(order)
    notes = detections.notes + score_notes + _conversion_notes(detections.layout, skeleton, head)
    if dropped:
        notes += (f"{dropped} of {len(detections.points)} people have no usable joint and are left out",)
    return Keypoints(
        keypoints=converted[order].astype(np.float32),
        frame=frame[order],
        person=person[order],
        image_id=np.array(ids, dtype=np.str_),
        frame_ids=frame_ids(ids, person[order]),
        image_size=None if size is None else np.array(size[rows[order]], dtype=np.float64),
        skeleton=skeleton,
        source_format=detections.source_format,
        source_layout=detections.layout.name,
        num_source_joints=detections.layout.num_joints,
        num_frames=num_frames,
        num_empty_frames=num_frames - len(np.unique(frame[order])),
        score_threshold=threshold,
        num_below_threshold=below,
        notes=notes,
    )


def _load(path: Path, layout: Layout | None) -> Detections:
    """Recognise the format by content and read it."""
    if path.is_dir():
        return read_openpose_folder(path, layout)
    content = path.read_bytes()
    if content.startswith((NPY_MAGIC, *ZIP_MAGIC)):
        return read_arrays(content, layout, str(path))
    document = parse_json(content, str(path))
    if isinstance(document, dict) and "people" in document:
        return read_openpose([(path, document)], layout)
    if isinstance(document, dict) and "annotations" in document:
        return read_coco_annotations(document, layout, str(path))
    if isinstance(document, list) and all(not isinstance(entry, dict) or "image_id" in entry for entry in document[:1]):
        return read_coco_results(document, layout, str(path))
    raise InputError(f"{path}: not a keypoint file known here{_looks_like(document)}; {SUPPORTED}")


def _looks_like(document: Any) -> str:
    """Return which tool wrote a document of another format, if its keys show that."""
    sample = document[0] if isinstance(document, list) and document else document
    if not isinstance(sample, dict):
        return f" (the JSON is {short(document)})"
    if "poses_3d" in sample:
        return " (it looks like lift's JSON: give its .npz)"
    for key, tool in (
        ("instance_info", "MMPose's"),
        ("instances", "MMPose's"),
        ("keypoint_scores", "MMPose's"),
        ("pose_landmarks", "MediaPipe's"),
        ("bodies", "AlphaPose's cmu format"),
    ):
        if key in sample:
            return f" (it looks like {tool})"
    return f" (its keys are {', '.join(sorted(map(str, sample))[:8]) or 'none'})"


def _checked_threshold(value: float | None) -> float | None:
    """Return the threshold as float."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not 0 <= value <= 1:
        raise InputError(f"score_threshold must be a number in 0..1 or None, got {short(value)}")
    return float(value)


def _sizes(
    detections: Detections, pair: tuple[float, float] | None, annotations: str | os.PathLike[str] | None, name: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return the image size of each row ``[B, 2]``, or None, and the names of all images known."""
    ids, known = detections.image_ids, detections.known_images
    if pair is not None:
        return np.broadcast_to(np.array(pair), (len(ids), 2)), known
    if annotations is None and not detections.images:
        return detections.image_size, known
    where, images = name, detections.images
    if annotations is not None:
        where = os.fspath(annotations)
        images = read_images(load_json(Path(annotations)), where)
    sizes, names = match_images(images, ids, where)
    absent = next((image_id for image_id in ids if sizes[image_id] is None), None)
    if absent is not None:
        if annotations is None:
            return None, known
        raise InputError(f"{where}: the entry for image id {absent} has no width and height")
    return np.array([sizes[image_id] for image_id in ids], dtype=np.float64).reshape(-1, 2), (*known, *names)


def _conversion_notes(layout: Layout, skeleton: Skeleton, head: str) -> tuple[str, ...]:
    """Say what the conversion did."""
    if layout.joint_names == skeleton.joint_names:
        return ()
    if layout is H36M_WITHOUT_NECK:
        return ("joint 9 (Neck/Nose) is missing in 16 joints",)
    if layout is H36M:
        return ("joint 9 (Neck/Nose) is dropped for 16 joints",)
    return (f"{layout.name} converted to {skeleton.name} by the head rule {head}",)
