"""Motion capture in world coordinates."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffupose.errors import InputError
from diffupose.skeleton import H36M_17

# Models are selected and uncertainty is calibrated on these people: no model is trained on them.
SELECTION_SUBJECTS = ("uiprmd_s10", "cmu_01")

# The people of the bundled sample to evaluate on; its other people are training poses of the baselines.
SAMPLE_SUBJECTS = ("uiprmd_s06",)


@dataclass(frozen=True)
class Mocap:
    """Poses of several people.

    Attributes:
        positions: ``[F, 17, 3]`` float32, metres, world frame, z up, Human3.6M order.
        subject: ``[F]`` name of the person.
        source: ``[F]`` name of the collection the clip comes from.
    """

    positions: np.ndarray
    subject: np.ndarray
    source: np.ndarray

    def select(self, index: np.ndarray) -> Mocap:
        """Return the poses at ``index`` (integers or a boolean mask)."""
        return Mocap(self.positions[index], self.subject[index], self.source[index])


def load_mocap(
    path: str | os.PathLike[str], *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> Mocap:
    """Load a motion-capture npz.

    Args:
        path: An npz with ``positions [F, 17, 3]`` (metres, world, z up), ``clip_index [F]``, ``clip_subject [C]`` and
            ``clip_source [C]``.
        include: Keep these subjects only.
        exclude: Leave these subjects out.

    Raises:
        InputError: If the file is not such an npz or no pose is left.
        FileNotFoundError: If there is no file.
    """
    name = os.fspath(path)
    positions, clip, clip_subject, clip_source = _read(path)
    if (
        positions.ndim != 3
        or positions.shape[1:] != (H36M_17.num_joints, 3)
        or positions.dtype.kind not in "fiu"
        or not np.isfinite(positions).all()
    ):
        raise InputError(
            f"positions in {name} must be finite numbers of shape [F, 17, 3], got {positions.dtype} {positions.shape}"
        )
    clips = (clip_subject.size,)
    if (
        clip_subject.shape != clips
        or clip_source.shape != clips
        or {clip_subject.dtype.kind, clip_source.dtype.kind} != {"U"}
    ):
        raise InputError(
            f"clip_subject and clip_source in {name} must be texts of one shape [C], got {clip_subject.dtype} "
            f"{clip_subject.shape} and {clip_source.dtype} {clip_source.shape}"
        )
    if clip.shape != positions.shape[:1] or clip.dtype.kind not in "iu":
        raise InputError(
            f"clip_index in {name} must be integers of shape {positions.shape[:1]}, got {clip.dtype} {clip.shape}"
        )
    if clip.size and not (clip.min() >= 0 and clip.max() < clip_subject.size):
        raise InputError(
            f"clip_index in {name} must be below {clip_subject.size}, the number of clips, and not negative, got "
            f"{clip.min()}..{clip.max()}"
        )
    positions = positions.astype(np.float32)
    subject, source = clip_subject[clip], clip_source[clip]
    wanted = None if include is None else set(include)
    keep = ~np.isin(subject, list(exclude))
    if wanted is not None:
        unknown = sorted(wanted - set(subject.tolist()))
        if unknown:
            raise InputError(f"subject {unknown[0]!r} is not in {name}, which has {', '.join(np.unique(subject))}")
        keep &= np.isin(subject, list(wanted))
    if not keep.any():
        raise InputError(f"no pose of {name} is left after selecting subjects")
    return Mocap(positions, subject, source).select(keep)


def _read(path: str | os.PathLike[str]) -> list[np.ndarray]:
    """Return the arrays of the file, whatever they hold."""
    name, keys = os.fspath(path), ("positions", "clip_index", "clip_subject", "clip_source")
    with open(path, "rb") as file:
        try:
            data = np.load(file, allow_pickle=False)
            if not isinstance(data, np.lib.npyio.NpzFile):
                raise InputError(f"{name} must be an npz of motion capture, got a plain array")
            missing = [key for key in keys if key not in data]
            if missing:
                raise InputError(f"{name} must hold {missing[0]!r}, it holds {', '.join(sorted(data))}")
            arrays = [data[key] for key in keys]
        except InputError:
            raise
        except Exception as error:
            # A damaged file raises many kinds of errors in zipfile, zlib and NumPy.
            reason = "it holds pickled objects, which are never loaded" if "allow_pickle" in str(error) else str(error)
            raise InputError(f"{name} is not a readable npz of plain arrays: {reason}") from None
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise InputError(f"{name} must hold NumPy arrays, it is another zip file")
    return arrays
