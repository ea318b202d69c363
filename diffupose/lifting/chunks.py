"""The chunks of one lift: as many frames and hypotheses at a time as fit into memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffupose._version import __version__
from diffupose.conditioning import make_conditioning, mirror_condition
from diffupose.config import LifterConfig, SamplingConfig
from diffupose.engines.engine import Engine, SampleRequest
from diffupose.lifting.inputs import PixelInput
from diffupose.schedule import StepTable
from diffupose.skeleton import SKELETONS

# Bytes that the activations of one chunk may take, where the engine has no limit of its own.
_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Views:
    """The cameras of a lift, as far as they are known.

    Attributes:
        image_size: (w, h) of shape ``[B, 2]``.
        focal: fx, fy in pixels, ``[B, 2]``, given or assumed.
        center: Principal points in pixels, ``[B, 2]``; goes with ``focal``.
        camera_known: Whether ``focal`` and ``center`` were given.
        assumed_focal: What was assumed for ``focal`` otherwise, in longer image sides.
    """

    image_size: Tensor | None
    focal: Tensor | None = None
    center: Tensor | None = None
    camera_known: bool = False
    assumed_focal: float | None = None


@dataclass(frozen=True)
class Chunks:
    """What all chunks of one lift share. Tensors with a row for each frame are on the CPU.

    Attributes:
        config: The model.
        pose_mean, pose_scale: ``[J, 3]`` metres, on the device of the engine: x0 stands for ``pose_mean + pose_scale
            x0``.
        engine: What runs the network.
        table: The sampler.
        settings: The sampling settings.
        seed: Of the noise.
        pixels: The keypoints.
        views: The cameras.
        frame_ids: ``[B]``.
    """

    config: LifterConfig
    pose_mean: Tensor
    pose_scale: Tensor
    engine: Engine
    table: StepTable
    settings: SamplingConfig
    seed: int
    pixels: PixelInput
    views: Views
    frame_ids: Tensor

    def run(self, progress: bool | None) -> Tensor:
        """Return hypotheses ``[B, H, J, 3]`` in metres; rows that cannot be lifted are NaN.

        Args:
            progress: Whether to show a progress bar; None shows it on a terminal.
        """
        count, flips = self.settings.num_hypotheses, (False, True) if self.settings.flip else (False,)
        total, device = count * len(flips), self.pose_mean.device
        shape = (len(self.frame_ids), total, *self.pose_mean.shape)
        hypotheses = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        rows = torch.nonzero(self.pixels.usable).squeeze(1)
        hidden = not (sys.stderr.isatty() if progress is None else progress)
        bar = tqdm(total=len(rows) * total, unit="pose", delay=1.0, disable=hidden)
        # The result is made outside of inference mode: callers may change it, and take it into autograd.
        with bar, torch.inference_mode():
            for frames, ids in self._split(rows):
                for flipped in flips:
                    chains, where = ids + count * flipped, _as_index(frames, device)
                    poses = self._lift(frames, chains, flipped)
                    hypotheses[where, int(chains[0]) : int(chains[-1]) + 1] = poses
                    bar.update(len(frames) * len(ids))
        return hypotheses

    def meta(self) -> dict[str, object]:
        """Return the settings of the lift, ready for JSON."""
        names = ("sampler", "num_inference_steps", "eta", "timestep_spacing", "variance", "num_hypotheses", "flip",
                 "antithetic", "aggregation")  # fmt: skip
        focal = self.views.focal
        return {
            "model": self.config.name,
            "input_normalization": self.config.input_normalization,
            **{name: getattr(self.settings, name) for name in names},
            "seed": self.seed,
            "focal_length_px": None
            if focal is None
            else sorted({round(float(f), 3) for f in focal[:, 0].unique()})[:8],
            "assumed_focal": self.views.assumed_focal,
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "diffupose": __version__,
            "torch": torch.__version__,
        }

    def _split(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frames and hypothesis ids that are lifted together."""
        count, most = self.settings.num_hypotheses, self.engine.max_hypotheses
        if most is None:
            # A network in PyTorch has about eight activations [J, d] alive at once.
            most = max(1, _CHUNK_BYTES // (len(self.pose_mean) * self.config.denoiser.hidden_dim * 4 * 8))
        for frames in rows.split(max(1, most // count)):
            for ids in torch.arange(count).split(most):
                yield frames, ids

    def _lift(self, frames: Tensor, hypothesis_ids: Tensor, flipped: bool) -> Tensor:
        """Return poses ``[b, h, J, 3]`` of some frames and hypotheses, of the mirrored keypoints if ``flipped``."""
        device, joints = self.pose_mean.device, None
        condition, turn = self._condition(frames)
        if flipped:
            condition, turn = mirror_condition(condition, self.config), turn * turn.new_tensor([[-1.0], [1.0], [1.0]])
            skeleton = SKELETONS[self.config.denoiser.skeleton]
            joints = torch.tensor(skeleton.flip_permutation, device=device)
        # All before the sampling, which the host does not wait for: a copy would.
        condition, turn, frame_ids, hypothesis_ids = (
            item.to(device) for item in (condition, turn, self.frame_ids[frames], hypothesis_ids)
        )
        if self.config.diffusion.deterministic:
            x0 = self._regress(condition, len(hypothesis_ids))
        else:
            clip = self.config.diffusion.clip_sample_range
            request = SampleRequest(condition, self.table, self.seed, frame_ids, hypothesis_ids, clip)
            x0 = self.engine.sample(request)
        poses = self.pose_mean + self.pose_scale * x0  # [b, h, J, 3]
        if joints is not None:
            poses = poses[:, :, joints]
        poses = poses @ turn.unsqueeze(1)  # the transpose of the turn back, for row vectors
        return poses - poses[:, :, :1]

    def _condition(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network sees of some frames, ``[b, J, C]``, and the turns ``[b, 3, 3]`` of its view.

        On the CPU: these are dozens of operations on a few numbers, and a GPU takes as long for each as for a layer.
        """
        views = self.views
        size, focal, center = (
            None if item is None else item[frames] for item in (views.image_size, views.focal, views.center)
        )
        conditioning = make_conditioning(
            self.pixels.keypoints[frames], self.pixels.present[frames], self.config, image_size=size, focal=focal,
            center=center, camera_known=views.camera_known,
        )  # fmt: skip
        return conditioning.condition, conditioning.rotation

    def _regress(self, condition: Tensor, num_hypotheses: int) -> Tensor:
        """Return what a deterministic model says, ``[b, h, J, 3]`` in data units: the same for every hypothesis."""
        last = torch.tensor([self.config.diffusion.num_train_timesteps - 1], device=condition.device)
        x0 = self.engine.denoise(torch.zeros_like(condition[..., :1]).expand(-1, -1, 3), condition, last)[..., :3]
        return x0.unsqueeze(1).expand(-1, num_hypotheses, -1, -1)


def _as_index(ids: Tensor, device: torch.device) -> slice | Tensor:
    """Return ascending ids as an index; a slice where none is left out, which nothing has to be copied for."""
    first = int(ids[0]) if len(ids) else 0
    every = slice(first, first + len(ids))
    return every if len(ids) == 0 or int(ids[-1]) == every.stop - 1 else ids.to(device)
