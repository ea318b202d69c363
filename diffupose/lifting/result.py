"""What a lift gives, and how it is written to disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffupose.config import Aggregation
from diffupose.files import atomic_path
from diffupose.lifting.aggregation import (
    best_by_reprojection,
    density_pick_of_hypotheses,
    mean_by_reprojection,
    medoid_of_hypotheses,
)
from diffupose.lifting.inputs import check_intrinsics
from diffupose.ops.hypothesis_statistics import HypothesisStatistics, hypothesis_statistics
from diffupose.skeleton import Skeleton

UNITS, COORDINATE_FRAME = "metres", "camera (x right, y down, z forward), root-relative"


@dataclass(frozen=True)
class LiftResult:
    """Hypotheses and what follows from them. Poses: metres, camera frame, joint 0 at the origin.

    Attributes:
        hypotheses: ``[B, H, J, 3]``; rows that could not be lifted are NaN.
        keypoints_2d: ``[B, J, 2]`` pixels in the model's joints; NaN where missing.
        confidence: ``[B, J]``; 0 where missing.
        skeleton: The joints.
        covariance_scale: ``[J]`` factors that calibrate ``covariance``.
        aggregation: What ``poses_3d`` is.
        translation: ``[B, H, 3]`` metres, the root in the camera frame, if intrinsics were given.
        usable: ``[B]`` False where a row could not be lifted.
        meta: Settings of the lift, ready for JSON.
    """

    hypotheses: Tensor
    keypoints_2d: Tensor
    confidence: Tensor
    skeleton: Skeleton
    covariance_scale: Tensor
    aggregation: Aggregation
    translation: Tensor | None
    usable: Tensor
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _statistics(self) -> HypothesisStatistics:
        return hypothesis_statistics(self.hypotheses)

    @property
    def mean(self) -> Tensor:
        """``[B, J, 3]``: the mean of the hypotheses, the best guess in the least-squares sense."""
        return self._statistics.mean

    @cached_property
    def medoid(self) -> Tensor:
        """``[B, J, 3]``: the hypothesis nearest to all others."""
        return medoid_of_hypotheses(self.hypotheses)

    @cached_property
    def covariance(self) -> Tensor:
        """``[B, J, 3, 3]`` square metres: unbiased covariance times the model's factors; NaN for H < 4."""
        return self._statistics.covariance * self.covariance_scale[:, None, None]

    @property
    def poses_3d(self) -> Tensor:
        """``[B, J, 3]``: the aggregate that the model's settings or the call chose."""
        return self.best(method=self.aggregation)

    def best(
        self,
        method: Literal["mean", "medoid", "density", "reprojection", "reprojection_mean"] = "mean",
        *,
        intrinsics: Any | None = None,
    ) -> Tensor:
        """Return one pose ``[B, J, 3]`` per row, chosen without any ground truth.

        Args:
            method: ``"mean"``; ``"medoid"``, the hypothesis nearest to all others; ``"density"``, the one where they
                lie densest; ``"reprojection"``, the one that, placed by linear least squares, projects nearest to the
                keypoints; ``"reprojection_mean"``, the mean of the hypotheses moved towards their viewing rays and
                weighted by how well they project (``aggregation.mean_by_reprojection``), the most accurate of them.
            intrinsics: Camera matrices ``[3, 3]`` or ``[B, 3, 3]`` in pixels, for the last two.

        Raises:
            ValueError: If the method is unknown or lacks its intrinsics.
        """
        if method == "mean":
            return self.mean
        if method == "medoid":
            return self.medoid
        if method == "density":
            return density_pick_of_hypotheses(self.hypotheses)
        if method not in ("reprojection", "reprojection_mean"):
            names = "mean, medoid, density, reprojection or reprojection_mean"
            raise ValueError(f"method must be {names}, got {method!r}")
        matrices = check_intrinsics(intrinsics, self.keypoints_2d.where(self.usable[:, None, None], torch.nan))
        if matrices is None:
            raise ValueError(f"intrinsics must be given for method {method}, got None")
        device = self.hypotheses.device
        matrices = matrices.expand(len(self.hypotheses), 3, 3)
        choose = best_by_reprojection if method == "reprojection" else mean_by_reprojection
        return choose(self.hypotheses, self.keypoints_2d.to(device), self.confidence.to(device), matrices.to(device))

    def arrays(
        self,
        frame: np.ndarray | None = None,
        person: np.ndarray | None = None,
        image_id: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return what ``save`` writes; see there."""
        batch = len(self.hypotheses)
        arrays = {
            "poses_3d": _numpy(self.poses_3d),
            "hypotheses": _numpy(self.hypotheses),
            "covariance": _numpy(self.covariance),
            "keypoints_2d": _numpy(self.keypoints_2d),
            "confidence": _numpy(self.confidence),
            "frame": np.arange(batch) if frame is None else np.asarray(frame),
            "person": np.zeros(batch, dtype=np.int64) if person is None else np.asarray(person),
            "image_id": np.arange(batch).astype(str) if image_id is None else np.asarray(image_id).astype(str),
            "joint_names": np.array(self.skeleton.joint_names),
            "edges": np.array(self.skeleton.edges),
            "units": np.array(UNITS),
            "coordinate_frame": np.array(COORDINATE_FRAME),
            "meta": np.array(json.dumps(self.meta)),
        }
        if self.translation is not None:
            arrays["translation"] = _numpy(self.translation)
        for name in ("frame", "person", "image_id"):
            if arrays[name].shape != (batch,):
                raise ValueError(f"{name} must have shape [{batch}], got {arrays[name].shape}")
        return arrays

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        frame: np.ndarray | None = None,
        person: np.ndarray | None = None,
        image_id: np.ndarray | None = None,
    ) -> None:
        """Write the result; the file appears complete or not at all.

        Args:
            path: ``.npz`` (no pickles inside) or ``.json`` (the same keys, NaN as null). Keys: ``poses_3d [B, J, 3]``
                (the default aggregate), ``hypotheses [B, H, J, 3]``, ``covariance [B, J, 3, 3]``, ``keypoints_2d
                [B, J, 2]``, ``confidence [B, J]``, ``frame [B]``, ``person [B]``, ``image_id [B]``, ``joint_names``,
                ``edges`` (parent, child), ``units``, ``coordinate_frame``, ``meta`` (JSON text), and with intrinsics
                ``translation [B, H, 3]``.
            frame: Number of the image of each row; default 0, 1, 2, ...
            person: Number of the person in the image; default 0.
            image_id: Name of the image; default the row.

        Raises:
            ValueError: If the suffix is another one, or an array does not fit.
            FileNotFoundError: If the folder does not exist.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".npz", ".json"):
            raise ValueError(f"path must end in .npz or .json, got {os.fspath(path)!r}")
        arrays = self.arrays(frame, person, image_id)
        with atomic_path(path) as temporary:
            if suffix == ".npz":
                np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
            else:
                content = {name: _plain(value) for name, value in arrays.items()}
                content["meta"] = self.meta
                temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float32).numpy()


def _plain(value: np.ndarray) -> Any:
    if value.dtype.kind != "f":
        return value.tolist()
    # The shortest decimals that give the same float32 back: as exact as the npz, and half as long as a float64's.
    plain = value.astype(str).astype(np.float64).astype(object)
    plain[~np.isfinite(value)] = None
    return plain.tolist()
