"""OpenPose JSON: one file per image, or a folder of them. Other tools write the same form with other joints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.checks import joint_row, load_json, short
from diffupose.keypoints.layouts import COCO, HALPE26, OPENPOSE_BODY25, OPENPOSE_COCO18, Layout, layout_by_count
from diffupose.keypoints.types import Detections

SUFFIX = "_keypoints.json"

_CANDIDATES = (OPENPOSE_BODY25, OPENPOSE_COCO18, HALPE26, COCO)
# The second name is that of versions before 1.1.
_KEYS = ("pose_keypoints_2d", "pose_keypoints")


def read_openpose_folder(folder: Path, layout: Layout | None) -> Detections:
    """Return the people of all ``*_keypoints.json`` files in a folder; a file without people is an empty frame.

    Raises:
        InputError: If there is no such file, or one of them is broken.
    """
    files = [path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIX) and path.is_file()]
    if not files:
        raise InputError(f"{folder}: the folder has no *{SUFFIX} file (OpenPose writes one per image)")
    return read_openpose([(path, load_json(path)) for path in files], layout)


def read_openpose(documents: list[tuple[Path, Any]], layout: Layout | None) -> Detections:
    """Return the people of OpenPose files, given as (path, JSON document).

    The image id is the file's name without its ending. Which joints they are is decided by their number.

    Raises:
        InputError: If a person has no body keypoints entry or the number of joints does not fit.
    """
    rows: list[np.ndarray] = []
    image_ids: list[str] = []
    labels: list[str] = []
    found = layout
    for path, document in documents:
        people = document.get("people") if isinstance(document, dict) else None
        if not isinstance(people, list):
            raise InputError(f"{path}: an OpenPose file must be an object with a list of people, got {short(document)}")
        for position, person in enumerate(people):
            where = f"{path}: people[{position}]"
            row = _body(person, where)
            if len(row) == 0:  # hands or a face only
                continue
            found = layout_by_count(len(row) // 3, _CANDIDATES, found, where)
            rows.append(row)
            image_ids.append(image_id_of(path))
            labels.append(f"{path.name}: people[{position}]")
    assumed = found is not None and layout is None
    found = found or OPENPOSE_BODY25
    return Detections(
        points=np.array(rows, dtype=np.float64).reshape(-1, found.num_joints, 3),
        # OpenPose gives people no score: they are ranked by their keypoints alone.
        scores=np.full(len(rows), np.nan),
        image_ids=image_ids,
        layout=found,
        source_format="openpose",
        describe=lambda row: labels[row],
        known_images=tuple(image_id_of(path) for path, _ in documents),
        notes=(f"layout {found.name}, by its {found.num_joints} joints",) if assumed else (),
    )


def image_id_of(path: Path) -> str:
    """Return the image id that a file's name stands for."""
    return path.name.removesuffix(SUFFIX) if path.name.endswith(SUFFIX) else path.stem


def _body(person: Any, where: str) -> np.ndarray:
    """Return x, y, confidence of one person's body joints, one after the other."""
    if not isinstance(person, dict):
        raise InputError(f"{where}: expected an object with {_KEYS[0]}, got {short(person)}")
    for key in _KEYS:
        if key in person:
            return joint_row(person[key], f"{where}: {key}")
    raise InputError(f"{where}: {_KEYS[0]} is not there, only {', '.join(sorted(person)) or 'nothing'}")
