"""Image ids: their natural order, and their sizes from a COCO ``images`` list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from diffupose.errors import InputError
from diffupose.keypoints.checks import image_size_pair, short, text_id
from diffupose.keypoints.types import ImageEntry

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a sort key that puts ``a2`` before ``a10``.

    Example:
        >>> sorted(["a10", "a2", "b", "a"], key=natural_key)
        ['a', 'a2', 'a10', 'b']
    """
    parts = []
    for position, part in enumerate(_DIGITS.split(text)):
        if position % 2:
            # Digits without leading zeros compare by length first. Python limits the digits that int() converts.
            digits = part.lstrip("0")
            parts.append((0, len(digits), digits))
        elif part:
            parts.append((1, 0, part))
    return tuple(parts), text


def natural_frames(image_ids: Sequence[str], known: Iterable[str]) -> tuple[np.ndarray, int]:
    """Return the rank of each image id among all images in natural order, ``[B]`` int64, and their number."""
    ordered = sorted({*image_ids, *known}, key=natural_key)
    rank = {image_id: position for position, image_id in enumerate(ordered)}
    return np.array([rank[image_id] for image_id in image_ids], dtype=np.int64), len(ordered)


def read_images(document: Any, where: str) -> tuple[ImageEntry, ...]:
    """Return the entries of a COCO ``images`` list.

    Raises:
        InputError: If there is none, or an id or a size in it is not what it should be.
    """
    images = document.get("images") if isinstance(document, dict) else document
    if not isinstance(images, list):
        raise InputError(f"{where}: expected a COCO images list ({{'images': [...]}}), got {short(document)}")
    entries: dict[str, ImageEntry] = {}
    for position, image in enumerate(images):
        at = f"{where}: images[{position}]"
        if not isinstance(image, dict):
            raise InputError(f"{at}: expected an object with id, width and height, got {short(image)}")
        image_id = text_id(image.get("id"), at)
        name, size = image.get("file_name"), None
        if image.get("width") is not None or image.get("height") is not None:
            size = image_size_pair((image.get("width"), image.get("height")), f"{at}: the size")
        entry = ImageEntry(image_id, name if isinstance(name, str) else None, size)
        if entries.setdefault(image_id, entry).size != size:
            raise InputError(f"{at}: image id {image_id} stands twice, with different sizes")
    return tuple(entries.values())


def match_images(
    images: Sequence[ImageEntry], image_ids: Sequence[str], where: str
) -> tuple[dict[str, tuple[float, float] | None], tuple[str, ...]]:
    """Find the entries of ``image_ids`` by id or else, all of them, by file name with or without its ending.

    Returns:
        The size by image id, and the names of all images in the same manner of naming.

    Raises:
        InputError: If one of ``image_ids`` has no entry.
    """
    by_id = {image.image_id: image.size for image in images}
    by_name: dict[str, tuple[float, float] | None] = {}
    by_stem: dict[str, tuple[float, float] | None] = {}
    for image in images:
        if image.file_name:
            by_name[image.file_name] = image.size
            by_stem[PurePosixPath(image.file_name).stem] = image.size
    # File names that differ by folder or ending only do not tell their images apart.
    candidates = [by_id, by_name] + ([by_stem] if len(by_stem) == len(images) else [])
    for sizes in candidates:
        if all(image_id in sizes for image_id in image_ids):
            return sizes, tuple(sizes)
    absent = next(image_id for image_id in image_ids if image_id not in by_id)
    raise InputError(f"{where}: no entry for image id {absent} in the images list ({len(images)} entries)")
