"""COCO keypoint JSON: the list of results, and the annotation file with its ``images``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.checks import joint_row, number, short, text_id
from diffupose.keypoints.images import read_images
from diffupose.keypoints.layouts import COCO, HALPE26, Layout, layout_by_count
from diffupose.keypoints.types import Detections

_CANDIDATES = (COCO, HALPE26)
_FLAGS = (0.0, 1.0, 2.0)
_COCO_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip


def read_coco_results(entries: list[Any], layout: Layout | None, name: str) -> Detections:
    """Return the people of a COCO results list.

    Raises:
        InputError: If an entry has no ``image_id`` or ``keypoints`` or their number does not fit.
    """
    return _read_entries(list(enumerate(entries)), layout, name, "entry {}", "coco_results")


def read_coco_annotations(document: dict[str, Any], layout: Layout | None, name: str) -> Detections:
    """Return the people of a COCO annotation file; a visibility flag of 0 means that a joint is absent.

    Raises:
        InputError: As ``read_coco_results``, or if the categories name other joints than COCO's.
    """
    annotations = document["annotations"]
    if not isinstance(annotations, list):
        raise InputError(f"{name}: annotations must be a list, got {short(annotations)}")
    images = read_images(document, name) if document.get("images") is not None else ()
    # Annotations of objects stand beside those of people and have no keypoints.
    entries = [
        (position, entry)
        for position, entry in enumerate(annotations)
        if not isinstance(entry, dict) or "keypoints" in entry
    ]
    if annotations and not entries:
        raise InputError(f"{name}: no annotation has keypoints (boxes or masks only?)")
    if layout is None:
        _check_category_names(document.get("categories"), name)
    found = _read_entries(entries, layout, name, "annotations[{}]", "coco_annotations")
    flags = bool(np.isin(found.points[..., 2], _FLAGS).all())
    return replace(
        found,
        confidence="flag" if flags else "score",
        images=images,
        known_images=tuple(image.image_id for image in images),
    )


def _read_entries(
    entries: list[tuple[int, Any]], layout: Layout | None, name: str, label: str, source_format: str
) -> Detections:
    """Read entries of (position in the file, object)."""
    rows, scores, image_ids = [], [], []
    found = layout
    for position, entry in entries:
        where = f"{name}: {label.format(position)}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object with image_id and keypoints, got {short(entry)}")
        for key in ("image_id", "keypoints"):
            if key not in entry:
                raise InputError(f"{where}: {key} is not there")
        image_ids.append(text_id(entry["image_id"], where))
        row = joint_row(entry["keypoints"], f"{where}: keypoints")
        found = layout_by_count(len(row) // 3, _CANDIDATES, found, where)
        rows.append(row)
        scores.append(number(entry.get("score"), f"{where}: score"))
    found = found or COCO
    return Detections(
        points=np.array(rows, dtype=np.float64).reshape(-1, found.num_joints, 3),
        scores=np.array(scores, dtype=np.float64),
        image_ids=image_ids,
        layout=found,
        source_format=source_format,
        describe=lambda row: f"{label.format(entries[row][0])} (image id {image_ids[row]})",
        notes=() if layout or found is COCO else (f"layout {found.name}, by its {found.num_joints} joints",),
    )


def _check_category_names(categories: Any, name: str) -> None:
    """Refuse annotation files whose 17 joints are others than COCO's."""
    for category in categories if isinstance(categories, list) else ():
        names = category.get("keypoints") if isinstance(category, dict) else None
        if not isinstance(names, list) or len(names) != len(_COCO_NAMES):
            continue
        plain = [str(joint).lower().replace(" ", "_").replace("-", "_") for joint in names]
        if plain != list(_COCO_NAMES):
            raise InputError(
                f"{name}: the categories name {len(names)} joints that are not COCO's ({short(names[0])}, "
                f"{short(names[1])}, ...): say which layout it is"
            )
