"""Camera geometry: projection, the two input normalisations, and the root by linear least squares.

Frames: *world* is z-up metres; *camera* is x right, y down, z forward, metres; images are pixels, y down. Everything is
batched torch, so that it runs on the training device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Focal length assumed when no intrinsics are given, in longer image sides: about what Human3.6M's cameras have.
ASSUMED_FOCAL = 1.15


def normalize_screen_coordinates(points: Tensor, image_size: Tensor) -> Tensor:
    """Map pixels so that the image's width spans [-1, 1], keeping the aspect ratio: ``X / w * 2 - [1, h / w]``.

    Args:
        points: Pixels of shape ``[..., 2]``.
        image_size: (width, height) in pixels, shape ``[2]`` or broadcastable to ``[..., 2]``.

    Returns:
        Screen coordinates of shape ``[..., 2]``.

    Reference:
        Pavllo et al. 2019 (VideoPose3D).
    """
    width = image_size[..., :1]
    return points / width * 2.0 - image_size / width


def turn_about_vertical(points: Tensor, angle: Tensor) -> Tensor:
    """Turn world points ``[..., 3]`` about the vertical axis z by angles ``[...]`` in radians."""
    cosine, sine = angle.cos(), angle.sin()
    x, y, z = points.unbind(-1)
    return torch.stack((cosine * x - sine * y, sine * x + cosine * y, z), dim=-1)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Return rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]``, order w, x, y, z; any norm."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def project(
    points: Tensor, focal: Tensor, center: Tensor, radial: Tensor | None = None, tangential: Tensor | None = None
) -> Tensor:
    """Project camera-frame points to pixels through a pinhole with optional Human3.6M lens distortion.

    Args:
        points: Camera frame, metres, shape ``[..., J, 3]``.
        focal: fx, fy in pixels, shape ``[..., 2]``.
        center: cx, cy in pixels, shape ``[..., 2]``.
        radial: k1, k2, k3, shape ``[..., 3]``.
        tangential: p1, p2, shape ``[..., 2]``.

    Returns:
        Pixels of shape ``[..., J, 2]``.

    Reference:
        The Human3.6M camera model as in Pavllo et al. 2019 (``project_to_2d``).
    """
    rays = points[..., :2] / points[..., 2:]  # [..., J, 2]
    if radial is not None and tangential is not None:
        # The polynomial is only valid near the image; far outside it would fold points back inside.
        rays = rays.clamp(-1.0, 1.0)
        factor, shift = _distortion(rays, radial, tangential)
        rays = rays * factor + shift
    return focal.unsqueeze(-2) * rays + center.unsqueeze(-2)


def _distortion(rays: Tensor, radial: Tensor, tangential: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a lens multiplies rays ``[..., J, 2]`` by, ``[..., J, 1]``, and then adds to them."""
    squared = rays.square().sum(dim=-1, keepdim=True)  # [..., J, 1]
    powers = torch.cat((squared, squared.square(), squared**3), dim=-1)  # [..., J, 3]
    factor = 1.0 + (radial.unsqueeze(-2) * powers).sum(dim=-1, keepdim=True)
    shear = (tangential.unsqueeze(-2) * rays).sum(dim=-1, keepdim=True)
    return factor + shear, tangential.unsqueeze(-2) * squared


def undistort(keypoints_2d: Tensor, focal: Tensor, center: Tensor, radial: Tensor, tangential: Tensor) -> Tensor:
    """Remove lens distortion: the pixels that a pinhole would have shown, by fixed-point iteration.

    Args:
        keypoints_2d: Pixels of shape ``[..., J, 2]``; NaN stays NaN.
        focal: fx, fy in pixels, shape ``[..., 2]``.
        center: cx, cy in pixels, shape ``[..., 2]``.
        radial: k1, k2, k3, shape ``[..., 3]``.
        tangential: p1, p2, shape ``[..., 2]``.

    Returns:
        Pixels of shape ``[..., J, 2]``, exact to 1e-3 pixels in and near images of Human3.6M's cameras.
    """
    seen = (keypoints_2d - center.unsqueeze(-2)) / focal.unsqueeze(-2)
    rays = seen
    for _ in range(20):
        factor, shift = _distortion(rays, radial, tangential)
        rays = ((seen - shift) / factor).clamp(-1.0, 1.0)
    rays = torch.where(seen.isnan(), seen, rays)
    return focal.unsqueeze(-2) * rays + center.unsqueeze(-2)


def rotation_to_ray(ray: Tensor) -> Tensor:
    """Return the smallest rotation that takes each viewing ray to the optical axis +z.

    Args:
        ray: Directions of shape ``[..., 3]`` with positive z; any length.

    Returns:
        Rotation matrices of shape ``[..., 3, 3]``: ``R @ ray`` is parallel to +z.
    """
    x, y, z = (ray / ray.norm(dim=-1, keepdim=True)).unbind(-1)
    # Rodrigues with axis ray x e_z and cosine z; 1 / (1 + z) is finite because z > 0.
    k = 1.0 / (1.0 + z)
    rows = (1 - k * x * x, -k * x * y, -x, -k * x * y, 1 - k * y * y, -y, x, y, z)
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def person_box(keypoints_2d: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre and the half longer side of the box around the present joints.

    Args:
        keypoints_2d: Pixels of shape ``[B, J, 2]``; missing joints may hold anything.
        present: Boolean mask of shape ``[B, J]``.

    Returns:
        Centre ``[B, 2]`` and scale ``[B, 1]``, in pixels. The scale is at least 1e-6.
    """
    infinity = torch.tensor(torch.inf, dtype=keypoints_2d.dtype, device=keypoints_2d.device)
    mask = present.unsqueeze(-1)
    low = torch.where(mask, keypoints_2d, infinity).amin(dim=-2)  # [B, 2]
    high = torch.where(mask, keypoints_2d, -infinity).amax(dim=-2)  # [B, 2]
    scale = 0.5 * (high - low).amax(dim=-1, keepdim=True)  # [B, 1]
    return 0.5 * (low + high), scale.clamp(min=1e-6)


def viewing_ray(points: Tensor, focal: Tensor, center: Tensor) -> Tensor:
    """Return the rays ``[..., 3]`` (z = 1) through pixels ``[..., 2]`` of a pinhole camera."""
    rays = (points - center) / focal
    return torch.cat((rays, torch.ones_like(rays[..., :1])), dim=-1)


def split_intrinsics(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Return focal ``[..., 2]`` and centre ``[..., 2]`` of camera matrices ``[..., 3, 3]`` without skew."""
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), dim=-1)
    return focal, intrinsics[..., :2, 2]


def estimate_translation(poses_3d: Tensor, keypoints_2d: Tensor, confidence: Tensor, intrinsics: Tensor) -> Tensor:
    """Estimate where the root is, so that each pose projects onto the keypoints, by linear least squares.

    Each joint gives two equations, ``tx - u tz = u Z - X`` and ``ty - v tz = v Z - Y``. Here (u, v) is the joint's
    viewing ray and (X, Y, Z) its root-relative position. The confidence weighs them. No ground truth is used.

    Args:
        poses_3d: Root-relative, camera frame, metres, shape ``[B, H, J, 3]``.
        keypoints_2d: Pixels, shape ``[B, J, 2]``; joints with zero confidence may be NaN.
        confidence: Weights, shape ``[B, J]``, not negative; 0 means missing.
        intrinsics: Camera matrices, shape ``[B, 3, 3]`` or ``[3, 3]``; distortion removed beforehand.

    Returns:
        Translations of the root in metres, camera frame, shape ``[B, H, 3]``. NaN where fewer than two joints are
        present, or all of them at one point.
    """
    dtype = poses_3d.dtype
    # Normal equations lose half the digits: solve them in float64.
    poses, weight = poses_3d.double(), confidence.double()
    focal, center = split_intrinsics(intrinsics.double())
    focal, center = focal.reshape(-1, 1, 2), center.reshape(-1, 1, 2)
    rays = torch.where(weight.unsqueeze(-1) > 0, (keypoints_2d.double() - center) / focal, 0.0)  # [B, J, 2]
    u, v = rays[:, None, :, 0], rays[:, None, :, 1]  # [B, 1, J]
    w = weight[:, None, :]
    right_u = u * poses[..., 2] - poses[..., 0]  # [B, H, J]
    right_v = v * poses[..., 2] - poses[..., 1]
    total = w.sum(-1)
    zero = torch.zeros_like(total)
    wu, wv = (w * u).sum(-1), (w * v).sum(-1)
    wuv = (w * (u * u + v * v)).sum(-1)
    matrix = torch.stack((total, zero, -wu, zero, total, -wv, -wu, -wv, wuv), dim=-1).unflatten(-1, (3, 3))
    right = torch.stack(
        ((w * right_u).sum(-1), (w * right_v).sum(-1), -(w * (u * right_u + v * right_v)).sum(-1)), dim=-1
    )  # [B, H, 3]
    solution, info = torch.linalg.solve_ex(matrix.expand(*right.shape[:2], 3, 3), right.unsqueeze(-1))
    # If all rays coincide, or there is only one, the depth is free. The matrix is then singular up to rounding, and
    # rounding would choose the depth.
    spread = (w * ((u - wu[..., None] / total[..., None]) ** 2 + (v - wv[..., None] / total[..., None]) ** 2)).sum(-1)
    usable = (info == 0) & (spread > 1e-20 * total)  # [B, H]
    return torch.where(usable.unsqueeze(-1), solution.squeeze(-1), torch.nan).to(dtype)
