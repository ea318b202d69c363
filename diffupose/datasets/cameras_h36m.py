"""The four cameras of Human3.6M, where each subject's recording had them, and what they see.

The calibration was published with the data set (Ionescu et al. 2014) and is repeated in many repositories, among them
SemGCN (Apache-2.0); here it has seven significant digits, which moves a projected joint by less than 0.001 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


_INTRINSICS: tuple[tuple[Any, ...], ...] = (  # the fields of H36MCamera but the last two
    ("54138969", (1000, 1002), (1145.0494, 1143.7811), (512.5415, 515.45148),
     (-0.2070989, 0.2477752, -0.00307515), (-0.0009756989, -0.001424472)),
    ("55011271", (1000, 1000), (1149.6757, 1147.5917), (508.84863, 508.06491),
     (-0.1942136, 0.2404085, 0.006819976), (-0.001619027, -0.002740894)),
    ("58860488", (1000, 1000), (1149.1407, 1148.799), (519.81586, 501.40265),
     (-0.2083382, 0.255488, -0.002460497), (0.001484387, -0.0007599993)),
    ("60457274", (1000, 1002), (1145.5114, 1144.7739), (514.9682, 501.88202),
     (-0.1983841, 0.2183237, -0.008947807), (-0.0005872056, -0.001813362)),
)  # fmt: skip

# Per subject and camera: orientation (w, x, y, z), then translation in metres. There is none for S2, S3 and S4.
_EXTRINSICS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "S1": (
        ((0.1407056, -0.1500702, -0.7552408, 0.6223280), (1.841107, 4.955285, 1.563445)),
        ((0.6157188, -0.7648363, -0.1483383, 0.1179474), (1.761279, -5.078007, 1.606265)),
        ((0.1465147, -0.1464785, 0.7653024, -0.6094176), (-1.846778, 5.215046, 1.491972)),
        ((0.5834008, -0.7853162, 0.1454882, -0.1474959), (-1.79479, -3.722699, 1.574893)),
    ),
    "S5": (
        ((0.1467377, -0.1623710, -0.7551893, 0.6178939), (2.097392, 4.880945, 1.605732)),
        ((0.6159759, -0.7626792, -0.1572819, 0.1189815), (2.031701, -5.167933, 1.612923)),
        ((0.1429137, -0.1290784, 0.7678385, -0.6110143), (-1.620595, 5.171659, 1.496437)),
        ((0.5920480, -0.7814218, 0.1274749, -0.1503642), (-1.637174, -3.867317, 1.547033)),
    ),
    "S6": (
        ((0.1337898, -0.1569240, -0.7571090, 0.6198879), (1.935452, 4.950246, 1.618084)),
        ((0.6147197, -0.7628813, -0.1617477, 0.1181924), (1.969804, -5.128739, 1.632779)),
        ((0.1529948, -0.1352913, 0.7646096, -0.6112781), (-1.769596, 5.185361, 1.476993)),
        ((0.5916101, -0.7804774, 0.1283227, -0.1561594), (-1.721669, -3.884131, 1.540488)),
    ),
    "S7": (
        ((0.1435242, -0.1631337, -0.7548329, 0.6188825), (1.974513, 4.926354, 1.597833)),
        ((0.6141673, -0.7638263, -0.1596646, 0.1177930), (1.937058, -5.11979, 1.631567)),
        ((0.1455006, -0.1287482, 0.7660517, -0.6127139), (-1.741811, 5.20825, 1.464825)),
        ((0.5912848, -0.7821764, 0.1244547, -0.1519649), (-1.734711, -3.832421, 1.548583)),
    ),
    "S8": (
        ((0.1411059, -0.1558987, -0.7561917, 0.6196440), (2.150652, 4.896161, 1.611905)),
        ((0.6169602, -0.7647668, -0.1484635, 0.1115816), (2.219966, -5.148453, 1.613044)),
        ((0.1471444, -0.1337712, 0.7670128, -0.6100370), (-1.571222, 5.137019, 1.498176)),
        ((0.5927824, -0.7825871, 0.1214782, -0.1463200), (-1.476913, -3.896741, 1.547972)),
    ),
    "S9": (
        ((0.1554059, -0.1554822, -0.7532095, 0.6199595), (2.044458, 4.935117, 1.481228)),
        ((0.6187845, -0.7634735, -0.1413224, 0.1193397), (1.99096, -5.123811, 1.568805)),
        ((0.1335783, -0.1367100, 0.7689455, -0.6100739), (-1.670992, 5.211986, 1.528388)),
        ((0.5879399, -0.7823407, 0.1427614, -0.1479487), (-1.696043, -3.8271, 1.591413)),
    ),
    "S11": (
        ((0.1523247, -0.1544232, -0.7547563, 0.6191070), (2.09844, 4.926555, 1.500279)),
        ((0.6189449, -0.7600917, -0.1530063, 0.1255258), (2.083182, -4.912173, 1.561079)),
        ((0.1494323, -0.1565023, 0.7681234, -0.6026304), (-1.609815, 5.177336, 1.537897)),
        ((0.5894251, -0.7818877, 0.1399121, -0.1471536), (-1.590738, -3.854169, 1.578018)),
    ),
}  # fmt: skip

H36M_CAMERAS: dict[str, tuple[H36MCamera, ...]] = {
    subject: tuple(H36MCamera(*intrinsics, *pose) for intrinsics, pose in zip(_INTRINSICS, poses, strict=True))
    for subject, poses in _EXTRINSICS.items()
}


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
