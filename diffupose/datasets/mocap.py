"""Motion capture in world coordinates."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffupose.errors import InputError
from diffupose.skeleton import H36M_17

# Never fitted on: variants are selected and uncertainty is calibrated on these people.
SELECTION_SUBJECTS = ("uiprmd_s10", "cmu_01")

# Who is in the bundled sample to be evaluated on; its other people are training poses for the baselines.
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
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise InputError(f"{name} must be an npz of motion capture, got a plain array")
        with data:
            missing = [key for key in ("positions", "clip_index", "clip_subject", "clip_source") if key not in data]
            if missing:
                raise InputError(f"{name} must hold {missing[0]!r}, it holds {', '.join(sorted(data))}")
            positions = data["positions"].astype(np.float32)
            clip = data["clip_index"]
            subject, source = data["clip_subject"][clip], data["clip_source"][clip]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, IndexError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{name} is not a readable npz: {error}") from None
    if positions.ndim != 3 or positions.shape[1:] != (H36M_17.num_joints, 3) or not np.isfinite(positions).all():
        raise InputError(f"positions in {name} must be finite, of shape [F, 17, 3], got {positions.shape}")
    if clip.shape != positions.shape[:1]:
        raise InputError(f"clip_index in {name} must have shape [{len(positions)}], got {clip.shape}")
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
