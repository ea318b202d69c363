"""What the Lifter accepts: keypoints, image sizes and camera matrices, checked and brought to one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffupose.keypoints.plausible import MAX_CONFIDENCE, MAX_COORDINATE, MAX_NORMALIZED, outside_image, why_unusable
from diffupose.skeleton import H36M_16, H36M_17, NECK, Skeleton, h36m_joints

# The assumed focal length may be as short as 0.05 image sides: then an image's edge lies at 10.
_WIDEST_RAY = 10.0


@dataclass(frozen=True)
class PixelInput:
    """Checked keypoints on the CPU.

    Attributes:
        keypoints: ``[B, J, 2]`` float32 pixels; NaN where missing.
        confidence: ``[B, J]``; 0 where missing.
        present: ``[B, J]`` booleans.
        usable: ``[B]``: True where ``why_unusable`` gives no reason.
    """

    keypoints: Tensor
    confidence: Tensor
    present: Tensor
    usable: Tensor

    @property
    def usable_keypoints(self) -> Tensor:
        """``[B, J, 2]``: the keypoints, NaN in all of a row that cannot be lifted."""
        return self.keypoints.where(self.usable[:, None, None], torch.nan)


def check_keypoints(keypoints: Any, skeleton: Skeleton, on_unusable: str) -> PixelInput:
    """Return keypoints of any accepted form for a model's skeleton.

    Raises:
        ValueError: Naming ``keypoints``, what was expected and what came.
    """
    if on_unusable not in ("error", "nan"):
        raise ValueError(f"on_unusable must be error or nan, got {on_unusable!r}")
    values = _as_float(keypoints, "keypoints")
    if values.ndim < 2 or values.shape[-1] not in (2, 3):
        raise ValueError(f"keypoints must have shape [B, {skeleton.num_joints}, 2 or 3], got {tuple(values.shape)}")
    values = values.reshape(-1, *values.shape[-2:])
    values = _fit_joints(values, skeleton)
    xy = values[..., :2]
    # A NaN confidence means missing. So does a negative one, which some detectors write.
    confidence = np.nan_to_num(values[..., 2], nan=0.0) if values.shape[-1] == 3 else np.ones(values.shape[:2])
    if wrong := _first(np.abs(confidence) > MAX_CONFIDENCE):
        got = f"{values[wrong][2]:g} in row {wrong[0]}, joint {wrong[1]}"
        raise ValueError(f"keypoints must have a confidence as third number, got {got} (a 3D pose?)")
    present = ~np.isnan(xy).any(axis=-1) & (confidence > 0)  # [B, J]
    seen = np.where(present[..., None], xy, 0.0)
    if wrong := _first(np.isinf(seen).any(axis=-1)):
        raise ValueError(f"keypoints must be finite (NaN: missing), got infinity in row {wrong[0]}, joint {wrong[1]}")
    if wrong := _first((np.abs(seen) > MAX_COORDINATE).any(axis=-1)):
        raise ValueError(f"keypoints must be pixels, got {seen[wrong].tolist()} in row {wrong[0]}, joint {wrong[1]}")
    if present.sum() > 2 and np.abs(seen).max() <= MAX_NORMALIZED:
        raise ValueError("keypoints must be pixels, got numbers within ±1.5: they look normalised already")
    pixels = np.where(present[..., None], xy, np.nan).astype(np.float32)
    problems = why_unusable(pixels, skeleton)
    usable = np.array([problem is None for problem in problems], dtype=bool)
    if on_unusable == "error" and not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(
            f'keypoints must show a person in every row, row {row} has {problems[row]} (on_unusable="nan" skips it)'
        )
    return PixelInput(
        torch.from_numpy(pixels),
        torch.from_numpy(np.where(present, np.minimum(confidence, 1.0), 0.0).astype(np.float32)),
        torch.from_numpy(present),
        torch.from_numpy(usable),
    )


def check_image_size(image_size: Any, pixels: PixelInput) -> Tensor | None:
    """Return image sizes as ``[B, 2]`` float32, or None.

    Raises:
        ValueError: If they are not one positive (w, h), or one per row, or the keypoints of a usable row lie absurdly
            far outside.
    """
    if image_size is None:
        return None
    values, batch = _as_float(image_size, "image_size"), len(pixels.keypoints)
    if values.shape not in ((2,), (batch, 2)):
        raise ValueError(f"image_size must be (w, h) or have shape [{batch}, 2], got {tuple(values.shape)}")
    if not (np.isfinite(values) & (values >= 1) & (values <= MAX_COORDINATE)).all():
        raise ValueError(f"image_size must hold positive pixels, got {values.ravel()[:2].tolist()}")
    size = torch.from_numpy(np.broadcast_to(values, (batch, 2)).astype(np.float32).copy())
    if wrong := _first(outside_image(pixels.usable_keypoints.numpy(), size.numpy())):
        raise ValueError(
            f"keypoints must lie in or near the image of {size[wrong[0]].tolist()}, got "
            f"{pixels.keypoints[wrong].tolist()} in row {wrong[0]}, joint {wrong[1]}"
        )
    return size


def check_intrinsics(intrinsics: Any, keypoints: Tensor) -> Tensor | None:
    """Return camera matrices as ``[1 or B, 3, 3]`` float32, or None.

    Raises:
        ValueError: If they are not pinhole matrices in pixels, or do not fit the ``keypoints [B, J, 2]``.
    """
    if intrinsics is None:
        return None
    values, batch = _as_float(intrinsics, "intrinsics"), len(keypoints)
    if values.shape not in ((3, 3), (batch, 3, 3)):
        raise ValueError(f"intrinsics must have shape [3, 3] or [{batch}, 3, 3], got {tuple(values.shape)}")
    values = values.reshape(-1, 3, 3)
    focal, zeros = values[:, (0, 1), (0, 1)], values[:, (0, 1, 2, 2), (1, 0, 0, 1)]
    sensible = np.isfinite(values).all() and (np.abs(values) <= MAX_COORDINATE).all() and (focal >= 1).all()
    if not sensible or zeros.any() or (values[:, 2, 2] != 1).any():
        raise ValueError(
            f"intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels, got {values[0].tolist()}"
        )
    rays = (keypoints.numpy(force=True) - values[:, None, :2, 2]) / focal[:, None]  # [B, J, 2]; NaN where missing
    if wrong := _first((np.abs(rays) > _WIDEST_RAY).any(axis=-1)):
        raise ValueError(
            f"intrinsics must be in pixels and fit the keypoints, but row {wrong[0]}, joint {wrong[1]} would lie more "
            f"than {np.degrees(np.arctan(_WIDEST_RAY)):.0f} degrees off the optical axis, got {values[0].tolist()}"
        )
    return torch.from_numpy(values.astype(np.float32))


def _first(wrong: Any) -> tuple[int, int] | None:
    """Return row and joint of the first True of ``wrong [B, J]``, if any."""
    found = np.argwhere(wrong)
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None


def _as_float(values: Any, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"an array of {array.dtype}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {error}") from None
    return array.astype(np.float64)


def _fit_joints(values: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    given, wanted = values.shape[1], skeleton.num_joints
    if given == wanted:
        return values
    if (given, wanted) == (H36M_17.num_joints, H36M_16.num_joints):
        return values[:, h36m_joints(wanted)]
    if (given, wanted) == (H36M_16.num_joints, H36M_17.num_joints):
        return np.insert(values, NECK, np.nan, axis=1)
    raise ValueError(f"keypoints must have {wanted} joints for this model, got {given}")


def check_assumed_focal(focal: object) -> None:
    """Raise ValueError unless this is a focal length in longer image sides, or None."""
    if focal is None or (isinstance(focal, (int, float, np.integer, np.floating)) and 0.05 <= focal <= 100):
        return
    raise ValueError(f"assumed_focal must be in longer image sides, 0.05 to 100, or None, got {focal}")


def check_seed(seed: object) -> int:
    """Return a 64-bit seed as a Python integer."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
    return int(seed)


def check_frame_ids(frame_ids: object, batch: int) -> Tensor:
    """Return frame ids ``[B]`` int64, default 0, 1, 2, ..."""
    if frame_ids is None:
        return torch.arange(batch)
    values = frame_ids.cpu() if isinstance(frame_ids, Tensor) else frame_ids
    if isinstance(values, (list, tuple)) and all(type(value) is int and -(2**63) <= value < 2**64 for value in values):
        # NumPy would make floats of small ids beside one above 2^63.
        values = np.array([value % 2**64 for value in values], dtype=np.uint64)
    array = np.asarray(values)
    if array.shape != (batch,) or array.dtype.kind not in "iu":
        raise ValueError(f"frame_ids must be {batch} integers, got shape {array.shape} of {array.dtype}")
    # Ids above 2^63 arrive as unsigned: the bit pattern is kept.
    return torch.from_numpy(array.astype(np.uint64).view(np.int64).copy())
