"""Checks of files whose content would silently give wrong poses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.plausible import (
    MAX_CONFIDENCE,
    MAX_COORDINATE,
    MAX_NORMALIZED,
    SIDES_OUTSIDE,
    outside_image,
)
from diffupose.keypoints.types import Detections

SUPPORTED = (
    "supported are COCO results ([{image_id, keypoints, score}, ...]), COCO annotations ({images, annotations}), "
    "OpenPose (a *_keypoints.json file or a folder of them), .npy and .npz arrays of keypoints "
    "[J, 2 or 3] or [B, J, 2 or 3], and the .npz that lift writes"
)

_FEW_VALUES = 3


def parse_json(content: bytes, where: str) -> Any:
    """Return the JSON document in ``content``.

    Raises:
        InputError: If it is none; the message names line and column.
    """
    if not content.strip():
        raise InputError(f"{where}: the file is empty")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: neither text nor a NumPy file; {SUPPORTED}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: broken JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        # Integers of more than 4300 digits, and lists nested a thousand deep.
        raise InputError(f"{where}: not readable as JSON: {error}") from None


def load_json(path: Path) -> Any:
    """Return the JSON document in a file."""
    return parse_json(path.read_bytes(), str(path))


def number_row(values: Any, where: str) -> np.ndarray:
    """Return a JSON list of numbers as float64 ``[K]``; null becomes NaN."""
    if not isinstance(values, list):
        raise InputError(f"{where}: expected a list of numbers, got {short(values)}")
    if not set(map(type, values)) <= {int, float}:
        for position, value in enumerate(values):
            if type(value) not in (int, float, type(None)):
                raise InputError(f"{where}: expected numbers, got {short(value)} at position {position}")
        values = [math.nan if value is None else value for value in values]
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise InputError(f"{where}: a number is too large") from None


def joint_row(values: Any, where: str) -> np.ndarray:
    """Return x, y and confidence of all joints, one after the other, as float64 ``[3 J]``."""
    row = number_row(values, where)
    if len(row) % 3:
        raise InputError(f"{where} must be x, y, confidence for each joint, got {len(row)} numbers")
    return row


def number(value: Any, where: str) -> float:
    """Return a JSON number as float; null becomes NaN."""
    return float(number_row([value], where)[0])


def text_id(value: Any, where: str) -> str:
    """Return an image id, an integer or a text, as text."""
    if type(value) not in (int, str) or value == "":
        raise InputError(f"{where}: image_id must be an integer or a text, got {short(value)}")
    return str(value)


def image_size_pair(value: Any, where: str) -> tuple[float, float]:
    """Return (w, h) as two positive floats."""
    try:
        pair = np.asarray(value)
    except (ValueError, OverflowError):
        pair = np.empty(0)
    # NumPy turns a bool beside a float into a number, so the elements are looked at.
    has_bool = isinstance(value, (tuple, list)) and any(isinstance(element, bool) for element in value)
    if has_bool or pair.dtype.kind not in "iuf" or pair.shape != (2,):
        raise InputError(f"{where} must be two numbers (width, height) in pixels, got {short(value)}")
    width, height = float(pair[0]), float(pair[1])
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise InputError(f"{where} must be positive (width, height) in pixels, got ({width:g}, {height:g})")
    return width, height


def short(value: Any) -> str:
    """Return a short text of a value, for messages."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    scalars = isinstance(value, list) and len(value) < 5 and all(np.isscalar(element) for element in value)
    if isinstance(value, (dict, list)) and not scalars:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        return "a very large integer"
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_confidence(detections: Detections, name: str) -> None:
    """Refuse a third value that cannot be a confidence, such as a depth."""
    confidence = detections.points[..., 2]
    wrong = np.argwhere(np.abs(confidence) > MAX_CONFIDENCE)
    if len(wrong):
        row, joint = wrong[0]
        raise InputError(
            f"{name}: {_place(detections, row, joint)}: the third value must be a confidence, "
            f"got {confidence[row, joint]:g} (a 3D pose?)"
        )


def check_points(points: np.ndarray, image_size: np.ndarray | None, detections: Detections, name: str) -> None:
    """Refuse absurd, normalised and absent coordinates; ``points [B, J, 3]`` have their missing joints marked."""
    if len(points) == 0:
        raise InputError(f"{name}: no person in any frame")
    coordinates = points[..., :2]
    _refuse_first(np.isinf(coordinates), "is infinite", points, detections, name)
    _refuse_first(np.abs(coordinates) > MAX_COORDINATE, f"is beyond {MAX_COORDINATE:g}", points, detections, name)
    present = coordinates[points[..., 2] > 0]  # [K, 2]
    if len(present) == 0:
        raise InputError(f"{name}: all joints are missing in all {len(points)} rows (NaN, or confidence 0)")
    if np.abs(present).max() <= MAX_NORMALIZED and len(np.unique(present)) > _FEW_VALUES:
        raise InputError(
            f"{name}: coordinates must be pixels, but all lie in {present.min():.3g}..{present.max():.3g}: they are "
            "normalised already (multiply x by the width and y by the height; for OpenPose write --keypoint_scale 0)"
        )
    if image_size is not None:
        outside = outside_image(coordinates, image_size)  # [B, J]
        # A few stray joints make one person unusable, which the lifter reports. If most joints of a person lie outside,
        # the size is that of another image.
        whole = 2 * outside.sum(axis=1) >= (points[..., 2] > 0).sum(axis=1)
        problem = f"is more than {SIDES_OUTSIDE:g} image sizes outside the image"
        _refuse_first((outside & whole[:, None])[..., None], problem, points, detections, name)


def _refuse_first(wrong: np.ndarray, problem: str, points: np.ndarray, detections: Detections, name: str) -> None:
    """Raise for the first joint of ``wrong [B, J, 1 or 2]``."""
    found = np.argwhere(wrong.any(axis=-1))
    if len(found):
        row, joint = found[0]
        x, y = points[row, joint, :2]
        raise InputError(f"{name}: {_place(detections, row, joint)} {problem}: ({x:g}, {y:g})")


def _place(detections: Detections, row: int, joint: int) -> str:
    """Return where a joint stands in the file."""
    return f"{detections.describe(int(row))}, joint {joint} ({detections.layout.joint_names[joint]})"
