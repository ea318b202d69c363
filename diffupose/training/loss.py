"""The training objective (Algorithm 1, eqs. 8-10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffupose.config import LifterConfig
from diffupose.schedule import NoiseSchedule
from diffupose.skeleton import SKELETONS, Skeleton
from diffupose.training.batches import TrainBatch
from diffupose.training.config import TrainConfig

_MIDDLE, _END = ("Elbow", "Knee", "Neck/Nose"), ("Wrist", "Ankle", "Foot")


def joint_weights(skeleton: Skeleton) -> Tensor:
    """Return the released weights ``[J]``: 4 at wrists and feet, 2 at elbows, knees and neck, else 1."""
    weights = [4.0 if name.endswith(_END) else 2.0 if name.endswith(_MIDDLE) else 1.0 for name in skeleton.joint_names]
    return torch.tensor(weights)


class DiffusionLoss(nn.Module):
    """Loss of the denoiser on a batch: noise the poses, predict, compare.

    The difference of ``[prediction, reconstructed 2D]`` from ``[target, 2D]`` is taken elementwise (L1 or squared). It
    is weighted by joint, and by λ in the reconstruction channels. The mean is over *all* channels: with five of them,
    the reconstruction weighs 2/3 λ compared with two separate means.
    """

    element_weight: Tensor
    pose_mean: Tensor
    pose_scale: Tensor

    def __init__(self, model: LifterConfig, config: TrainConfig, pose_mean: Tensor, pose_scale: Tensor) -> None:
        super().__init__()
        self.diffusion, self.config = model.diffusion, config
        self.schedule = NoiseSchedule(model.diffusion.num_train_timesteps, model.diffusion.beta_schedule)
        skeleton = SKELETONS[model.denoiser.skeleton]
        weight = torch.ones(skeleton.num_joints, 3)
        if model.standardize_poses:
            # In metres joints that move far would dominate, in deviations all would count alike: this lies between.
            weight = (pose_scale / pose_scale.mean()).cpu().clamp(min=0.2)
        weight = torch.cat((weight, torch.full((skeleton.num_joints, 2), config.reconstruction_weight)), dim=-1)
        if config.joint_weights:
            weight = weight * joint_weights(skeleton).unsqueeze(-1)
        self.register_buffer("element_weight", weight)
        self.register_buffer("pose_mean", pose_mean)
        self.register_buffer("pose_scale", pose_scale)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps ``[B]`` and noise ``[B, J, 3]`` for a whole batch."""
        device, joints = generator.device, self.pose_mean.shape[0]
        timesteps = torch.randint(self.schedule.num_train_timesteps, (batch_size,), generator=generator, device=device)
        return timesteps, torch.randn(batch_size, joints, 3, generator=generator, device=device)

    def forward(self, denoiser: nn.Module, batch: TrainBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the mean loss, a scalar."""
        x0 = (batch.poses_3d - self.pose_mean) / self.pose_scale
        if self.diffusion.deterministic:
            noisy, timesteps = torch.zeros_like(x0), torch.full_like(timesteps, self.schedule.num_train_timesteps - 1)
        else:
            noisy = self.schedule.add_noise(x0, noise, timesteps)
        output = denoiser(noisy, batch.condition, timesteps)
        if self.diffusion.prediction_type == "epsilon":
            target = noise
        elif self.diffusion.prediction_type == "sample":
            target = x0
        else:
            target = self.schedule.get_velocity(x0, noise, timesteps)
        if output.shape[-1] > 3:
            target = torch.cat((target, batch.condition[..., :2]), dim=-1)
            output = output[..., : target.shape[-1]]
        difference = (output - target).abs() if self.config.loss == "l1" else (output - target).square()
        return (difference * self.element_weight[:, : target.shape[-1]]).mean()
