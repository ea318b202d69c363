"""Seeded virtual cameras and detector noise: from world-frame motion capture to images of people.

All draws come from one ``torch.Generator`` on the device of the poses, for the whole batch at once. A process that
works on a slice draws the whole batch and keeps its slice, so the number of processes changes nothing. Frames and units
are those of ``diffupose.camera``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from diffupose.camera import project, quaternion_to_matrix, turn_about_vertical
from diffupose.datasets.cameras_h36m import H36M_CAMERAS
from diffupose.skeleton import H36M_17

WILD_IMAGE_SIZES = ((1280, 720), (1920, 1080), (1080, 1920), (1000, 1000))

# Detector noise: standard deviation per joint, in longer sides of the person's clean box.
_TORSO, _MIDDLE, _END = 0.008, 0.012, 0.02
JOINT_NOISE = (
    _TORSO, _TORSO, _MIDDLE, _END, _TORSO, _MIDDLE, _END, _TORSO, _TORSO, _MIDDLE, _MIDDLE,
    _TORSO, _MIDDLE, _END, _TORSO, _MIDDLE, _END,
)  # fmt: skip
OUTLIER_NOISE, OUTLIER_PROBABILITY, MISSING_PROBABILITY, LIMB_PROBABILITY = 0.10, 0.03, 0.03, 0.05
LIMBS = ((1, 2, 3), (4, 5, 6), (11, 12, 13), (14, 15, 16))


@dataclass(frozen=True)
class CameraRanges:
    """What the ``wild`` rig draws from: uniform ranges and standard deviations."""

    focal: tuple[float, float]  # longer image sides
    pitch: tuple[float, float]  # degrees, down is positive
    roll_sd: float  # degrees
    distance: tuple[float, float]  # metres
    aim_sd: float  # metres per axis


EVALUATION_RANGES = CameraRanges((0.8, 1.6), (-10.0, 35.0), 4.0, (2.5, 6.0), 0.15)
TRAINING_RANGES = CameraRanges((0.6, 2.0), (-15.0, 40.0), 8.0, (1.5, 10.0), 0.2)
EVALUATION_SUBJECTS, TRAINING_SUBJECTS = ("S9",), ("S1", "S5", "S6", "S7", "S8")


@dataclass(frozen=True)
class Views:
    """A batch of people seen by cameras; every field has the batch first.

    Attributes:
        poses_3d: ``[B, J, 3]`` metres, camera frame, root-relative.
        root: ``[B, 3]`` metres, camera frame.
        keypoints_2d: ``[B, J, 2]`` pixels.
        present: ``[B, J]`` False where a joint is missing.
        image_size: ``[B, 2]`` (w, h).
        focal, center: ``[B, 2]`` pixels.
        radial, tangential: ``[B, 3]`` and ``[B, 2]`` lens distortion, zeros where there is none.
    """

    poses_3d: Tensor
    root: Tensor
    keypoints_2d: Tensor
    present: Tensor
    image_size: Tensor
    focal: Tensor
    center: Tensor
    radial: Tensor
    tangential: Tensor

    def __getitem__(self, index: Tensor | slice) -> Views:
        """Return the views at ``index``."""
        return Views(*(tensor[index] for tensor in _tensors(self)))

    @property
    def outside(self) -> Tensor:
        """``[B, J]``: True where a joint lies outside the image."""
        inside = (self.keypoints_2d >= 0) & (self.keypoints_2d < self.image_size.unsqueeze(1))
        return ~inside.all(dim=-1)

    @property
    def usable(self) -> Tensor:
        """``[B]``: everybody is in front of the camera and at most half of the joints are outside the image."""
        depth = self.poses_3d[..., 2] + self.root[:, None, 2]
        return (self.outside.float().mean(dim=1) <= 0.5) & (depth.amin(dim=1) > 0.3)


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw uniform float32 numbers on the generator's device."""
    return torch.rand(*shape, generator=generator, device=generator.device) * (high - low) + low


def normal(generator: torch.Generator, *shape: int, sd: float = 1.0) -> Tensor:
    """Draw normal float32 numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device) * sd


def turn_heading(positions: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each person ``[B, J, 3]`` by a uniform angle about the vertical axis through the root, and centre it there.

    The root ends above the world's origin, the lowest joint on the floor z = 0.
    """
    angle = uniform(generator, positions.shape[0], high=2 * math.pi)
    origin = torch.cat((positions[:, 0, :2], positions[..., 2].amin(dim=1, keepdim=True)), dim=-1)  # [B, 3]
    return turn_about_vertical(positions - origin[:, None], angle[:, None])


def h36m_views(positions: Tensor, subjects: tuple[str, ...], generator: torch.Generator) -> Views:
    """See each person by one of the published cameras, standing within 1 m of the world's origin.

    Args:
        positions: World frame, centred by ``turn_heading``, ``[B, J, 3]``.
        subjects: Human3.6M subjects whose cameras are drawn from.
        generator: Source of the draws.
    """
    batch, device = positions.shape[0], positions.device
    rig = _h36m_rig(subjects, device)
    camera = torch.randint(len(rig["focal"]), (batch,), generator=generator, device=device)
    radius = uniform(generator, batch).sqrt()  # uniform over the disc
    angle = uniform(generator, batch, high=2 * math.pi)
    place = torch.stack((radius * angle.cos(), radius * angle.sin(), torch.zeros_like(radius)), dim=-1)  # [B, 3]
    shifted = positions + place[:, None] - rig["translation"][camera][:, None]
    points = shifted @ rig["world_to_camera"][camera].transpose(1, 2)
    lens = (rig[key][camera] for key in ("image_size", "focal", "center", "radial", "tangential"))
    return _see(points, *lens, distorted=True)


def wild_views(positions: Tensor, ranges: CameraRanges, generator: torch.Generator) -> Views:
    """See each person by a random pinhole camera aimed near the pelvis; arguments as in ``h36m_views``."""
    batch, device = positions.shape[0], positions.device
    sizes = torch.tensor(WILD_IMAGE_SIZES, dtype=positions.dtype, device=device)
    image_size = sizes[torch.randint(len(sizes), (batch,), generator=generator, device=device)]
    focal = uniform(generator, batch, low=ranges.focal[0], high=ranges.focal[1]) * image_size.amax(dim=1)
    pitch = uniform(generator, batch, low=ranges.pitch[0], high=ranges.pitch[1]).deg2rad()
    roll = normal(generator, batch, sd=ranges.roll_sd).deg2rad()
    distance = uniform(generator, batch, low=ranges.distance[0], high=ranges.distance[1])
    aim = positions[:, 0] + normal(generator, batch, 3, sd=ranges.aim_sd)  # [B, 3]
    zero, one = torch.zeros_like(pitch), torch.ones_like(pitch)
    # The camera looks along world y, tilted down by the pitch. The person's heading is random already.
    right = torch.stack((one, zero, zero), dim=-1)
    forward = torch.stack((zero, pitch.cos(), -pitch.sin()), dim=-1)
    down = torch.stack((zero, -pitch.sin(), -pitch.cos()), dim=-1)
    c, s = roll.cos()[:, None], roll.sin()[:, None]
    rotation = torch.stack((c * right + s * down, c * down - s * right, forward), dim=1)  # rows: camera axes in world
    eye = aim - distance[:, None] * forward
    points = (positions - eye[:, None]) @ rotation.transpose(1, 2)
    lens = torch.zeros(batch, 5, dtype=positions.dtype, device=device)
    focal = focal[:, None].expand(-1, 2)
    return _see(points, image_size, focal, image_size / 2, lens[:, :3], lens[:, 3:], distorted=False)


def detect(
    views: Views,
    scale: Tensor,
    generator: torch.Generator,
    *,
    missing_scale: Tensor | None = None,
    drop_outside: Tensor | None = None,
) -> Views:
    """Return the views as a detector would see them.

    Args:
        views: Clean views.
        scale: Noise level per person, ``[B]``: 1 is the evaluation's. It multiplies deviations and probabilities, but
            not the outliers' deviation, nor their probability above 1.
        generator: Source of the draws.
        missing_scale: ``[B]`` level of the probabilities that joints and limbs are missing; default ``scale``.
        drop_outside: ``[B]`` True where joints outside the image are missing; default everywhere.
    """
    missing_scale = scale if missing_scale is None else missing_scale
    batch, joints = views.present.shape
    keypoints, device = views.keypoints_2d, views.keypoints_2d.device
    side = (keypoints.amax(dim=1) - keypoints.amin(dim=1)).amax(dim=-1)  # [B]
    outlier = uniform(generator, batch, joints) < OUTLIER_PROBABILITY * scale[:, None].clamp(max=1.0)
    deviation = torch.tensor(JOINT_NOISE, device=device) * scale[:, None]
    deviation = torch.where(outlier, torch.full_like(deviation, OUTLIER_NOISE), deviation) * side[:, None]
    noisy = keypoints + deviation.unsqueeze(-1) * normal(generator, batch, joints, 2)
    missing = uniform(generator, batch, joints) < MISSING_PROBABILITY * missing_scale[:, None]
    limb = torch.zeros(len(LIMBS), joints, dtype=torch.bool, device=device)
    for row, limb_joints in enumerate(LIMBS):
        limb[row, list(limb_joints)] = True
    chosen = limb[torch.randint(len(LIMBS), (batch,), generator=generator, device=device)]  # [B, J]
    missing |= chosen & (uniform(generator, batch, 1) < LIMB_PROBABILITY * missing_scale[:, None])
    seen = replace(views, keypoints_2d=noisy)
    cut = seen.outside if drop_outside is None else seen.outside & drop_outside[:, None]
    # Joints outside stay if more than half would be missing: such a person could not be used.
    cut &= ((cut | missing).float().mean(dim=1) <= 0.5)[:, None]
    return replace(seen, present=views.present & ~(missing | cut))


def choose_views(candidates: list[Views]) -> Views:
    """Return, for each person, the first usable of several draws, or the last one."""
    chosen = candidates[-1]
    for views in reversed(candidates[:-1]):
        pairs, usable = zip(_tensors(views), _tensors(chosen), strict=True), views.usable
        chosen = Views(*(torch.where(usable.reshape(-1, *(1,) * (new.ndim - 1)), new, old) for new, old in pairs))
    return chosen


def concatenate(first: Views, second: Views) -> Views:
    """Return two batches of views as one."""
    return Views(*(torch.cat(pair) for pair in zip(_tensors(first), _tensors(second), strict=True)))


def _tensors(views: Views) -> list[Tensor]:
    return [getattr(views, item.name) for item in fields(Views)]


def _see(
    points: Tensor,
    image_size: Tensor,
    focal: Tensor,
    center: Tensor,
    radial: Tensor,
    tangential: Tensor,
    *,
    distorted: bool,
) -> Views:
    # A point behind the camera has no image: the clamp keeps it finite, and ``usable`` is False for such a view.
    in_front = torch.cat((points[..., :2], points[..., 2:].clamp(min=0.05)), dim=-1)
    # Without distortion ``project`` must not clamp the rays. Looking at the coefficients would stall a GPU.
    keypoints = project(in_front, focal, center, *((radial, tangential) if distorted else ()))
    present = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    return Views(
        points - points[:, :1], points[:, 0], keypoints, present, image_size, focal, center, radial, tangential
    )


@cache
def _h36m_rig(subjects: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    cameras = [camera for subject in subjects for camera in H36M_CAMERAS[subject]]

    def stack(name: str) -> Tensor:
        return torch.tensor([list(getattr(camera, name)) for camera in cameras], dtype=torch.float64)

    rig = {name: stack(name) for name in ("translation", "focal", "center", "radial", "tangential")}
    rig |= {"world_to_camera": quaternion_to_matrix(stack("orientation")).transpose(1, 2), "image_size": stack("size")}
    return {key: value.float().to(device) for key, value in rig.items()}


# Bones that change length together, by child joint: hips, thighs, shanks, spine, neck, head, shoulders, arms.
_BONE_GROUPS = ((1, 4), (2, 5), (3, 6), (7,), (8,), (9,), (10,), (11, 14), (12, 15), (13, 16))


@cache
def _bone_matrices(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    joints = H36M_17.num_joints
    ancestors, groups = torch.zeros(joints, joints), torch.zeros(len(_BONE_GROUPS), joints)
    for joint in range(joints):
        current = joint
        while current >= 0:
            ancestors[joint, current] = 1.0
            current = H36M_17.parents[current]
    for row, children in enumerate(_BONE_GROUPS):
        groups[row, list(children)] = 1.0
    parents = torch.tensor([max(parent, 0) for parent in H36M_17.parents])
    return ancestors.to(device), groups.to(device), parents.to(device)


def vary_bodies(
    positions: Tensor, generator: torch.Generator, *, body_sd: float = 0.06, bone_sd: float = 0.06, mirror: bool = True
) -> Tensor:
    """Give people other bodies: log-normal bone lengths (left equals right), and left and right mirrored half the time.

    Args:
        positions: World frame, ``[B, 17, 3]``.
        generator: Source of the draws.
        body_sd: Deviation of the log of the whole body's size.
        bone_sd: Deviation of the log of each group of bones.
        mirror: Mirror half of the people.
    """
    ancestors, groups, parents = _bone_matrices(positions.device)
    batch = positions.shape[0]
    log_scale = normal(generator, batch, len(groups), sd=bone_sd) + normal(generator, batch, 1, sd=body_sd)
    factor = (log_scale @ groups).exp()  # [B, J]
    bones = (positions - positions[:, parents]) * factor.unsqueeze(-1)  # the root's bone is 0
    varied = positions[:, :1] + ancestors @ bones
    if mirror:
        flipped = varied[:, list(H36M_17.flip_permutation)] * varied.new_tensor([-1.0, 1.0, 1.0])
        varied = torch.where((uniform(generator, batch) < 0.5)[:, None, None], flipped, varied)
    return varied
