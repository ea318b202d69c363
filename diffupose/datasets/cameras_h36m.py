"""The four cameras of Human3.6M, where each subject's recording had them, and what they see.

The calibration was published with the data set (Ionescu et al. 2014) and is repeated in many repositories, among them
SemGCN (Apache-2.0). ``data/cameras_h36m.json`` has seven significant digits, which moves a projected joint by less than
0.001 px.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch

from diffupose.camera import quaternion_to_matrix


@dataclass(frozen=True)
class H36MCamera:
    """One calibrated camera.

    Attributes:
        id: Serial number, as in the data set's file names.
        size: Image (width, height), in pixels.
        focal: Focal lengths (fx, fy), in pixels.
        center: Principal point (cx, cy), in pixels.
        radial: Radial distortion (k1, k2, k3).
        tangential: Tangential distortion (p1, p2).
        orientation: Unit quaternion (w, x, y, z) whose inverse turns world axes into camera axes.
        translation: Position of the camera in the world (z up), in metres.
    """

    id: str
    size: tuple[int, int]
    focal: tuple[float, float]
    center: tuple[float, float]
    radial: tuple[float, float, float]
    tangential: tuple[float, float]
    orientation: tuple[float, float, float, float]
    translation: tuple[float, float, float]

    @property
    def intrinsics(self) -> np.ndarray:
        """Matrix ``[3, 3]`` of the camera without its distortion, in pixels, float64."""
        (fx, fy), (cx, cy) = self.focal, self.center
        return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def _load_cameras() -> dict[str, tuple[H36MCamera, ...]]:
    text = (resources.files("diffupose") / "data" / "cameras_h36m.json").read_text(encoding="utf-8")
    document = json.loads(text, object_hook=lambda entry: {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    })  # fmt: skip
    return {
        subject: tuple(
            H36MCamera(**intrinsics, **pose) for intrinsics, pose in zip(document["intrinsics"], poses, strict=True)
        )
        for subject, poses in document["poses"].items()
    }


H36M_CAMERAS = _load_cameras()
"""The four cameras of each subject. There are none for S2, S3 and S4."""


def _check_points(points: np.ndarray, name: str) -> np.ndarray:
    """Return the points in float64 after checking their last axis."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim == 0 or points.shape[-1] != 3:
        raise ValueError(f"{name} must have shape [..., 3], got {points.shape}")
    return points


def world_to_camera(points: np.ndarray, camera: H36MCamera) -> np.ndarray:
    """Return world points in the camera's frame: ``conj(q) (X - t) q``.

    Args:
        points: Points of shape ``[..., 3]`` in the world frame (z up), in metres.
        camera: The camera.

    Returns:
        Points of shape ``[..., 3]`` in the camera frame (x right, y down, z forward), in metres, float64.

    Raises:
        ValueError: If the last axis is not 3.

    Example:
        >>> camera = H36M_CAMERAS["S1"][0]
        >>> bool(abs(world_to_camera(np.array(camera.translation), camera)).max() == 0.0)
        True
    """
    points = _check_points(points, "points")
    rotation = quaternion_to_matrix(torch.tensor(camera.orientation, dtype=torch.float64)).numpy()
    # A row times the matrix is its transpose, the inverse rotation, times the column.
    return np.asarray((points - np.array(camera.translation)) @ rotation)


def project(points_camera: np.ndarray, camera: H36MCamera) -> np.ndarray:
    """Return where the camera sees points, with the distortion model of the community's 2D files.

    With ``u = (x/z, y/z)`` and ``r2 = |u|^2``: ``u (1 + k1 r2 + k2 r2^2 + k3 r2^3 + p . u) + p r2``, then focal
    lengths and principal point. The tangential part is the one that ``data_2d_h36m_gt.npz`` is made with; OpenCV
    pairs ``p1`` and ``p2`` with the other axes and doubles ``p . u``. The polynomial holds near the image only.

    Args:
        points_camera: Points of shape ``[..., 3]`` in the camera frame, in metres.
        camera: The camera.

    Returns:
        Pixels of shape ``[..., 2]``, float64; NaN for points that are not in front of the camera (z > 0).

    Raises:
        ValueError: If the last axis is not 3.

    Example:
        >>> project(np.array([0.0, 0.0, 4.0]), H36M_CAMERAS["S1"][0]).tolist()
        [512.5415, 515.45148]

    Reference:
        Pavllo et al. 2019 (VideoPose3D).
    """
    points = _check_points(points_camera, "points_camera")
    depth = np.where(points[..., 2:] > 0.0, points[..., 2:], np.nan)
    ray = points[..., :2] / depth  # [..., 2]
    tangential = np.array(camera.tangential)
    r2 = np.sum(ray * ray, axis=-1, keepdims=True)  # [..., 1]
    k1, k2, k3 = camera.radial
    factor = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3)) + np.sum(tangential * ray, axis=-1, keepdims=True)
    return (ray * factor + tangential * r2) * np.array(camera.focal) + np.array(camera.center)
