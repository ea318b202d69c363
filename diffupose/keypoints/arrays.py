"""Plain NumPy files: .npy, .npz, and the .npz that lift writes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Literal

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.layouts import (
    COCO,
    H36M,
    H36M_WITHOUT_NECK,
    HALPE26,
    HUMANEVA,
    LAYOUTS,
    OPENPOSE_BODY25,
    OPENPOSE_COCO18,
    Layout,
    layout_by_count,
)
from diffupose.keypoints.types import Detections

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")

_CANDIDATES = (H36M, H36M_WITHOUT_NECK, HUMANEVA, OPENPOSE_BODY25, OPENPOSE_COCO18, HALPE26)
_KEYPOINT_KEYS = ("keypoints", "keypoints_2d")
_FIELDS = (*_KEYPOINT_KEYS, "confidence", "frame", "person", "image_id", "image_size", "joint_names")


def read_arrays(content: bytes, layout: Layout | None, name: str) -> Detections:
    """Return the people of a .npy or .npz file, given as its bytes.

    A .npz holds ``keypoints`` or ``keypoints_2d`` or one single array, and may hold ``confidence [B, J]``,
    ``frame [B]``, ``person [B]``, ``image_id [B]`` and ``image_size [2]`` or ``[B, 2]``. Without ``frame`` and
    ``image_id`` every row is an image of its own.

    Raises:
        InputError: If the file is broken or pickled, or an array is not what it should be.
    """
    source_format, fields = _load(content, name)
    keypoints = fields["keypoints"]
    if keypoints.dtype.kind not in "iuf":
        raise InputError(f"{name}: keypoints must be numbers, got {keypoints.dtype}")
    if keypoints.ndim not in (2, 3) or keypoints.shape[-1] not in (2, 3):
        raise InputError(
            f"{name}: keypoints must have shape [J, 2 or 3] or [B, J, 2 or 3], got {keypoints.shape}"
            + ("; flatten frames and people to rows and give frame and person" if keypoints.ndim == 4 else "")
        )
    single = keypoints.ndim == 2
    keypoints = keypoints.reshape(-1, *keypoints.shape[-2:]).astype(np.float64)  # [B, J, 2 or 3]
    num_rows, num_joints = keypoints.shape[:2]
    layout, notes = _layout(fields, num_joints, layout, name)

    points = keypoints
    confidence_kind: Literal["score", "none"] = "score"
    if "confidence" in fields:
        confidence = fields["confidence"][None] if single and fields["confidence"].ndim == 1 else fields["confidence"]
        if keypoints.shape[-1] == 3:
            raise InputError(f"{name}: confidence must stand in keypoints [B, J, 3] or beside [B, J, 2], got both")
        if confidence.dtype.kind not in "iuf" or confidence.shape != (num_rows, num_joints):
            raise InputError(
                f"{name}: confidence must be numbers of shape {(num_rows, num_joints)}, "
                f"got {confidence.dtype} {confidence.shape}"
            )
        points = np.concatenate([keypoints, confidence[..., None].astype(np.float64)], axis=-1)  # [B, J, 3]
    elif keypoints.shape[-1] == 2:
        # Detectors without confidence write (0, 0), the corner of the image, for a joint that they did not find.
        absent = (keypoints == 0).all(axis=-1)
        points = np.concatenate([keypoints, np.where(absent, 0.0, 1.0)[..., None]], axis=-1)  # [B, J, 3]
        confidence_kind = "none"
        if absent.any():
            notes += (f"{int(absent.sum())} joints at exactly (0, 0) are taken as missing",)

    image_ids, frame, person = _rows(fields, num_rows, name)
    return Detections(
        points=points,
        scores=np.full(num_rows, np.nan),
        image_ids=image_ids,
        layout=layout,
        source_format=source_format,
        describe=lambda row: f"row {row}",
        confidence=confidence_kind,
        image_size=_image_size(fields, num_rows, name),
        frame=frame,
        person=person,
        notes=notes,
    )


def _load(content: bytes, name: str) -> tuple[str, dict[str, np.ndarray]]:
    """Return the format and the arrays we know; the keypoints are under ``"keypoints"``."""
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return "npy", {"keypoints": loaded}
        keys = list(loaded.files)
        present = [key for key in _KEYPOINT_KEYS if key in keys]
        if len(present) == 2:
            raise InputError(f"{name}: holds both keypoints and keypoints_2d; keep one of them")
        if not present and len(keys) == 1:
            present = keys
        if not present:
            raise InputError(f"{name}: needs an array keypoints or keypoints_2d, holds {', '.join(keys) or 'nothing'}")
        fields = {key: loaded[key] for key in _FIELDS if key in keys and key not in _KEYPOINT_KEYS}
        fields["keypoints"] = loaded[present[0]]
        for key, field in fields.items():
            if not isinstance(field, np.ndarray):  # any other zip file
                raise InputError(f"{name}: a zip file, but {key} in it is no NumPy array")
        return "lift" if "poses_3d" in keys else "npz", fields
    except InputError:
        raise
    except Exception as error:  # a damaged file raises many kinds of error
        if "allow_pickle" in str(error):
            raise InputError(
                f"{name}: holds pickled objects, which are never loaded; save plain arrays of numbers"
            ) from None
        raise InputError(f"{name}: not a readable NumPy file: {error}") from None


def _layout(
    fields: Mapping[str, np.ndarray], num_joints: int, layout: Layout | None, name: str
) -> tuple[Layout, tuple[str, ...]]:
    """Return the joint order: the one asked for, or by the file's joint names, or by the number of joints."""
    if layout is None and "joint_names" in fields:
        names = tuple(str(joint) for joint in fields["joint_names"].ravel())
        for known in LAYOUTS.values():
            if known.joint_names == names and known.num_joints == num_joints:
                return known, ()
    found = layout_by_count(num_joints, _CANDIDATES, layout, f"{name}: keypoints")
    if layout is not None:
        return found, ()
    others = f", not {COCO.name}" if num_joints == COCO.num_joints else ""
    return found, (f"layout {found.name} is assumed for an array of {num_joints} joints{others}",)


def _rows(
    fields: Mapping[str, np.ndarray], num_rows: int, name: str
) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
    """Return image id, frame and person of each row; frame or person is None where it has to be derived."""
    for key in ("frame", "person", "image_id"):
        if key in fields:
            array = fields[key]
            kinds = "iuUS" if key == "image_id" else "iu"
            if array.dtype.kind not in kinds or array.shape != (num_rows,):
                what = "integers or texts" if key == "image_id" else "integers"
                raise InputError(
                    f"{name}: {key} must be {what} of shape {(num_rows,)}, got {array.dtype} {array.shape}"
                )
            if key != "image_id" and num_rows and not (array.min() >= 0 and array.max() < 2**62):
                raise InputError(f"{name}: {key} must not be negative, got {array.min()}..{array.max()}")
    frame = fields["frame"].astype(np.int64) if "frame" in fields else None
    person = fields["person"].astype(np.int64) if "person" in fields else None
    if "image_id" in fields:
        ids = fields["image_id"]
        image_ids = [item.decode("latin-1") if isinstance(item, bytes) else str(item) for item in ids.tolist()]
    elif frame is not None:
        image_ids = [str(number) for number in frame.tolist()]
    elif person is not None:
        raise InputError(f"{name}: person needs frame or image_id beside it")
    else:
        frame = np.arange(num_rows, dtype=np.int64)
        return [str(row) for row in range(num_rows)], frame, np.zeros(num_rows, dtype=np.int64)
    if frame is not None:
        pairs = set(zip(frame.tolist(), image_ids, strict=True))
        if not len(pairs) == len(set(image_ids)) == len(np.unique(frame)):
            raise InputError(f"{name}: frame and image_id contradict each other: they must name the same images")
    if person is not None:
        seen: set[tuple[str, int]] = set()
        for row, key_pair in enumerate(zip(image_ids, person.tolist(), strict=True)):
            if key_pair in seen:
                raise InputError(f"{name}: row {row}: person {key_pair[1]} of image id {key_pair[0]} stands twice")
            seen.add(key_pair)
    return image_ids, frame, person


def _image_size(fields: Mapping[str, np.ndarray], num_rows: int, name: str) -> np.ndarray | None:
    """Return the file's own image sizes ``[B, 2]``."""
    if "image_size" not in fields:
        return None
    size = fields["image_size"]
    if size.dtype.kind not in "iuf" or size.shape not in ((2,), (num_rows, 2)):
        raise InputError(f"{name}: image_size must be numbers of shape (2,) or ({num_rows}, 2), got {size.shape}")
    if not (np.isfinite(size) & (size > 0)).all():
        raise InputError(f"{name}: image_size must be positive (width, height) in pixels")
    return np.broadcast_to(size.astype(np.float64), (num_rows, 2))
