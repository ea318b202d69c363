"""From pixels to the denoiser's condition, the same way in training, evaluation and the Lifter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffupose.camera import normalize_screen_coordinates, person_box, rotation_to_ray, viewing_ray
from diffupose.config import LifterConfig
from diffupose.mean_pose import fill_missing_joints
from diffupose.skeleton import SKELETONS


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's condition for a batch of poses, and the frame it predicts in.

    Attributes:
        condition: ``[B, J, C]``: normalised x, y; presence (1 or 0) and the camera cue, if the model has them. Missing
            joints are 0 with a presence channel and filled by the mean pose without one.
        rotation: ``[B, 3, 3]``: takes a camera-frame pose to the frame in which the network predicts; its transpose
            takes a prediction back.
    """

    condition: Tensor
    rotation: Tensor

    def turn(self, poses_3d: Tensor) -> Tensor:
        """Return poses ``[B, J, 3]`` of the camera's frame in the frame in which the network predicts."""
        return poses_3d @ self.rotation.transpose(1, 2)


def make_conditioning(
    keypoints_2d: Tensor,
    present: Tensor,
    config: LifterConfig,
    *,
    image_size: Tensor | None = None,
    focal: Tensor | None = None,
    center: Tensor | None = None,
    camera_known: Tensor | bool = False,
) -> Conditioning:
    """Normalise keypoints as a model's configuration says.

    Args:
        keypoints_2d: Pixels of shape ``[B, J, 2]``; missing joints may hold anything.
        present: Boolean mask of shape ``[B, J]``.
        config: The model.
        image_size: (w, h) of shape ``[B, 2]``; needed by ``image`` normalisation.
        focal: fx, fy in pixels, ``[B, 2]``; with ``person`` normalisation, None leaves predictions unturned.
        center: Principal points in pixels, ``[B, 2]``; goes with ``focal``.
        camera_known: Whether ``focal`` and ``center`` are known and not assumed, one bool or ``[B]``. Only known ones
            become the camera cue.
    """
    batch = keypoints_2d.shape[0]
    # Filling changes nothing if no joint is missing, and to check that would stall a GPU. 15 joints have no mean pose.
    if config.denoiser.condition_channels == 2 and (present.shape[1] >= 16 or not bool(present.all())):
        keypoints_2d, present = fill_missing_joints(keypoints_2d, present), torch.ones_like(present)
    identity = torch.eye(3, dtype=keypoints_2d.dtype, device=keypoints_2d.device).expand(batch, 3, 3)
    if config.input_normalization == "image":
        if image_size is None:
            raise ValueError("image_size is needed by a model with image normalisation, got None")
        normalized, rotation = normalize_screen_coordinates(keypoints_2d, image_size.unsqueeze(1)), identity
    else:
        box_center, scale = person_box(keypoints_2d, present)
        normalized = (keypoints_2d - box_center.unsqueeze(1)) / scale.unsqueeze(1)  # [B, J, 2]
        rotation = identity
        if focal is not None and center is not None:
            rotation = rotation_to_ray(viewing_ray(box_center, focal, center))
    mask = present.unsqueeze(-1)
    normalized = torch.where(mask, normalized, torch.zeros_like(normalized))
    if config.denoiser.condition_channels == 3:
        normalized = torch.cat((normalized, mask.to(normalized.dtype)), dim=-1)
    if config.denoiser.camera_cue:
        known = torch.as_tensor(camera_known, device=keypoints_2d.device).expand(batch)
        normalized = torch.cat((normalized, _camera_cue(keypoints_2d, present, known, focal, center)), dim=-1)
    return Conditioning(normalized, rotation)


def mirror_condition(condition: Tensor, config: LifterConfig) -> Tensor:
    """Return the condition ``[B, J, C]`` of the mirrored person: normalised x is 0 in the middle and changes sign."""
    channels = config.denoiser.condition_channels
    sign = condition.new_ones(condition.shape[-1])
    sign[0] = -1.0
    if config.denoiser.camera_cue:
        sign[channels + 2] = -1.0
    return condition[:, list(SKELETONS[config.denoiser.skeleton].flip_permutation)] * sign


# Log of the angular half size of a person at a middle distance of the training; it centres the cue.
_TYPICAL_LOG_SIZE = -1.6


def _camera_cue(
    keypoints_2d: Tensor, present: Tensor, known: Tensor, focal: Tensor | None, center: Tensor | None
) -> Tensor:
    """Return ``[B, J, 4]``: known, log angular half size, tangents of the direction; zeros where not known."""
    cue = keypoints_2d.new_zeros(len(keypoints_2d), 4)
    if focal is not None and center is not None:
        box_center, scale = person_box(keypoints_2d, present)
        size = (scale / focal).log().mean(dim=-1, keepdim=True) - _TYPICAL_LOG_SIZE
        values = torch.cat((torch.ones_like(size), size, (box_center - center) / focal), dim=-1)
        cue = torch.where(known[:, None], values, cue)
    return cue[:, None].expand(-1, keypoints_2d.shape[1], -1)
