"""Training batches of Human3.6M: detections or projected ground truth, each sample as it is and mirrored."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from diffupose.conditioning import make_conditioning
from diffupose.config import LifterConfig
from diffupose.datasets.h36m import H36MSequence
from diffupose.errors import InputError
from diffupose.skeleton import SKELETONS
from diffupose.training.batches import Shuffle, TrainBatch, subject_weights
from diffupose.training.config import TrainConfig


class H36MBatches:
    """All frames of all sequences, twice when mirrored, in a new order every epoch.

    Frames with more than half of the joints missing are left out with a warning.

    Raises:
        InputError: If no frame is left.
    """

    def __init__(
        self, sequences: list[H36MSequence], model: LifterConfig, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.skeleton = SKELETONS[model.denoiser.skeleton]

        def gather(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays).astype(np.float32)).to(device)

        keypoints = gather([sequence.keypoints_2d for sequence in sequences])  # [F, J, 2 or 3]
        usable = _present(keypoints).float().mean(dim=1) >= 0.5  # [F]
        if not bool(usable.any()):
            raise InputError("no frame is left: more than half of the joints are missing in every one")
        if not bool(usable.all()):
            left_out = int((~usable).sum())
            warnings.warn(
                f"{left_out} of {len(usable)} frames are left out: more than half of the joints are missing",
                stacklevel=2,
            )
        self.keypoints = keypoints[usable]
        self.poses_3d = gather([sequence.poses_3d for sequence in sequences])[usable]
        lengths = torch.tensor([len(sequence.poses_3d) for sequence in sequences])
        cameras = [(*sequence.camera.size, *sequence.camera.focal, *sequence.camera.center) for sequence in sequences]
        camera = torch.tensor(cameras, dtype=torch.float32).repeat_interleave(lengths, dim=0).to(device)
        self.camera = camera[usable]  # [F, 6]
        self.num_frames = len(self.poses_3d)
        self.num_samples = self.num_frames * (2 if config.mirror else 1)
        weights = None
        if config.balance_subjects:
            subjects = np.repeat([sequence.subject for sequence in sequences], lengths.numpy())[usable.cpu().numpy()]
            weights = subject_weights(subjects).repeat(2 if config.mirror else 1)
        self.shuffle = Shuffle(self.num_samples, config.seed, weights)

    def batch(self, step: int, batch_size: int | None = None) -> TrainBatch:
        """Return the whole batch of a step, over all processes, or another ``batch_size``."""
        index = self.shuffle.indices(step, batch_size or self.config.batch_size).to(self.device)
        frame, mirrored = index % self.num_frames, index >= self.num_frames
        keypoints, poses, camera = self.keypoints[frame], self.poses_3d[frame], self.camera[frame]
        size, focal, center = camera.split(2, dim=-1)
        order = list(self.skeleton.flip_permutation)
        flip = mirrored[:, None, None]
        flipped = keypoints[:, order].clone()
        flipped[..., 0] = size[:, :1] - flipped[..., 0]
        keypoints = torch.where(flip, flipped, keypoints)
        poses = torch.where(flip, poses[:, order] * poses.new_tensor([-1.0, 1.0, 1.0]), poses)
        mirror_center = torch.stack((size[:, 0] - center[:, 0], center[:, 1]), dim=-1)
        center = torch.where(mirrored[:, None], mirror_center, center)
        conditioning = make_conditioning(
            keypoints[..., :2], _present(keypoints), self.model, image_size=size, focal=focal, center=center
        )
        return TrainBatch(conditioning.condition, conditioning.turn(poses))


def _present(keypoints: Tensor) -> Tensor:
    present = torch.isfinite(keypoints).all(dim=-1)  # [F, J]
    return present & (keypoints[..., 2] > 0) if keypoints.shape[-1] == 3 else present
