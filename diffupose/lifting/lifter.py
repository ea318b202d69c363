"""The Lifter: pixels in, N plausible 3D poses out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffupose.camera import ASSUMED_FOCAL, estimate_translation, split_intrinsics
from diffupose.checkpoint import save_lifter_file
from diffupose.config import Aggregation, SamplingConfig
from diffupose.devices import find_device
from diffupose.engines.choose import EngineChooser
from diffupose.engines.engine import Precision
from diffupose.lifting.chunks import Chunks, Views
from diffupose.lifting.inputs import (
    PixelInput,
    check_assumed_focal,
    check_frame_ids,
    check_image_size,
    check_intrinsics,
    check_keypoints,
    check_seed,
)
from diffupose.lifting.result import LiftResult
from diffupose.networks.build import LifterFile, load_lifter_file
from diffupose.ops._backend import Backend
from diffupose.reference.hypothesis_statistics import MIN_HYPOTHESES
from diffupose.schedule import NoiseSchedule, Sampler, StepTable, TimestepSpacing, Variance, step_table
from diffupose.skeleton import SKELETONS, Skeleton


class Lifter:
    """Lifts 2D keypoints to 3D poses.

    Example:
        >>> lifter = Lifter.from_pretrained()
        >>> keypoints = 400.0 + 100.0 * torch.randn(1, 17, 2)
        >>> lifter(keypoints, image_size=(1280, 720), num_hypotheses=5, seed=0).hypotheses.shape
        torch.Size([1, 5, 17, 3])
    """

    def __init__(self, file: LifterFile, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.config = file.config
        self.denoiser = file.denoiser.to(self.device, torch.float32).eval()
        self.pose_mean = file.pose_mean.to(self.device)
        self.pose_scale = file.pose_scale.to(self.device)
        self.covariance_scale = file.covariance_scale.to(self.device)
        self.prediction_error = file.prediction_error
        diffusion = self.config.diffusion
        self.schedule = NoiseSchedule(diffusion.num_train_timesteps, diffusion.beta_schedule)
        self._engines = EngineChooser()

    @property
    def skeleton(self) -> Skeleton:
        """The joints of the poses."""
        return SKELETONS[self.config.denoiser.skeleton]

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str] = "mocap", *, device: str = "auto") -> Lifter:
        """Load a lifter.

        Args:
            name_or_path: ``"mocap"`` (bundled), a file of ours (``.safetensors``), or a checkpoint of the released
                DiffuPose code (``best_model.pt``), which needs no options.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ...

        Raises:
            FileNotFoundError: If there is no such file and no bundled model of that name.
            InputError: If the file is damaged or not a checkpoint.
            ValueError: If there is no such device.
        """
        find_device(device)  # before the work of reading
        path = Path(name_or_path)
        models = resources.files("diffupose") / "models"
        bundled = models / f"{path.name}.safetensors"
        # A folder of the same name in the working directory is no reason to fail: ./mocap is a path, mocap a name.
        if path.name == os.fspath(name_or_path) and not path.is_file() and bundled.is_file():
            with resources.as_file(bundled) as bundled_path:
                file = load_lifter_file(bundled_path)
        elif not path.exists() and path.name == os.fspath(name_or_path) and not path.suffix:
            names = sorted(Path(item.name).stem for item in models.iterdir() if item.name.endswith(".safetensors"))
            raise FileNotFoundError(f"model must be a file or a bundled name ({', '.join(names)}), got {path.name!r}")
        else:
            file = load_lifter_file(path)
        return cls(file, find_device(device))

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the lifter as one safetensors file that ``from_pretrained`` reads."""
        save_lifter_file(
            path,
            self.denoiser,
            self.config,
            self.pose_mean,
            self.pose_scale,
            self.covariance_scale,
            self.prediction_error,
        )

    def sampling(self, **overrides: object) -> SamplingConfig:
        """Return the checkpoint's sampling settings with those overrides that are not None."""
        # NumPy's numbers are as good as Python's, and JSON takes only the latter.
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in overrides.items()
            if value is not None
        }
        if given.get("sampler", "ddim") != "ddim" and "eta" not in given:
            given["eta"] = 0.0
        if given.get("sampler") == "dpm++" and "variance" not in given:
            given["variance"] = "fixed_small"
        return replace(self.config.sampling, **given)  # type: ignore[arg-type]

    def needs_image_size(self, has_intrinsics: bool, assumed_focal: float | None) -> bool:
        """Return whether a lift needs the image size: for screen coordinates, or for the assumed focal length."""
        person = self.config.input_normalization == "person"
        return not person or (not has_intrinsics and assumed_focal is not None)

    def step_table(self, settings: SamplingConfig) -> StepTable:
        """Return the sampler of some settings as a table.

        Raises:
            ValueError: If the settings do not fit each other or the model.
        """
        error = None
        if settings.variance == "analytic":
            if self.prediction_error is None:
                raise ValueError("variance must be fixed_small for a model without a prediction error, got 'analytic'")
            error = self.prediction_error.double().numpy()
        return step_table(
            self.schedule,
            settings.num_inference_steps,
            sampler=settings.sampler,
            eta=settings.eta,
            prediction_type=self.config.diffusion.prediction_type,
            timestep_spacing=settings.timestep_spacing,
            prediction_error=error,
        )

    @torch.no_grad()
    def __call__(
        self,
        keypoints: Tensor | np.ndarray | Sequence[object],
        *,
        image_size: Tensor | np.ndarray | Sequence[float] | None = None,
        intrinsics: Tensor | np.ndarray | Sequence[object] | None = None,
        num_hypotheses: int | None = None,
        num_inference_steps: int | None = None,
        sampler: Sampler | None = None,
        eta: float | None = None,
        timestep_spacing: TimestepSpacing | None = None,
        variance: Variance | None = None,
        flip: bool | None = None,
        antithetic: bool | None = None,
        aggregation: Aggregation | None = None,
        seed: int = 0,
        frame_ids: Tensor | np.ndarray | Sequence[int] | None = None,
        assumed_focal: float | None = ASSUMED_FOCAL,
        on_unusable: Literal["error", "nan"] = "error",
        backend: Backend | None = None,
        precision: Precision = "float32",
        progress: bool | None = None,
    ) -> LiftResult:
        """Lift 2D keypoints to ``num_hypotheses`` 3D poses each.

        Args:
            keypoints: Pixels of shape ``[J, 2 or 3]`` or ``[..., J, 2 or 3]``, the third number a confidence. NaN or a
                confidence that is not positive means missing; one above 1 counts as 1. 17 joints in Human3.6M order, or
                16 without neck/nose.
            image_size: (w, h) in pixels, or ``[B, 2]``. Models with ``person`` normalisation need it for the assumed
                focal length only.
            intrinsics: Camera matrices ``[3, 3]`` or ``[B, 3, 3]`` in pixels, lens distortion removed beforehand; gives
                ``result.translation``.
            num_hypotheses: N, default from the checkpoint; with ``flip`` there are 2 N.
            num_inference_steps: Network calls per hypothesis.
            sampler: ``"ddpm"``, ``"ddim"`` or ``"dpm++"``.
            eta: Fresh noise of DDIM, 0 to 1.
            timestep_spacing: ``"trailing"``, ``"leading"``, ``"linspace"`` or ``"quadratic"``.
            variance: ``"fixed_small"`` or ``"analytic"`` (``schedule.step_table``).
            flip: Add the hypotheses of the mirrored input, mirrored back, with noise of their own.
            antithetic: Only False. Pairs of opposite noise are no longer drawn: they spoil the covariance.
            aggregation: What ``result.poses_3d`` is: ``"mean"``, ``"medoid"`` or ``"density"``.
            seed: 64-bit seed. Results depend on it and on ``frame_ids``, not on the batch.
            frame_ids: ``[B]`` 64-bit ids, default 0, 1, 2, ...
            assumed_focal: Focal length in longer image sides that turns predictions without intrinsics into the camera
                frame (``person`` normalisation); None leaves them as seen by a camera that looks at the person.
            on_unusable: What to do with rows that cannot be lifted: more than half of the joints missing, all at one
                point or normalised already, or a joint too far from all others.
            backend: ``"auto"`` (the C++ or the CUDA engine where it can run, else Triton on a GPU), ``"cpp"``,
                ``"cuda"``, ``"triton"`` or ``"torch"``; None takes the environment variable DIFFUPOSE_BACKEND, or else
                ``"auto"``.
            precision: ``"float32"``, or ``"bfloat16"`` for the products of the C++ engine (about twice as fast on
                processors with AVX512-BF16, slower on others) or on a GPU (tensor cores).
            progress: Show a progress bar; default when it takes long and a terminal is there.

        Returns:
            The hypotheses and what follows from them: root-relative, metres, camera frame (x right, y down, z forward).

        Raises:
            ValueError: If an argument does not fit; the message names it.
            BackendUnavailableError: If the named backend cannot run here.
        """
        settings = self.sampling(
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            eta=eta,
            timestep_spacing=timestep_spacing,
            variance=variance,
            num_hypotheses=num_hypotheses,
            flip=flip,
            antithetic=antithetic,
            aggregation=aggregation,
        )
        table = self.step_table(settings)
        seed = check_seed(seed)
        num_timesteps = self.config.diffusion.num_train_timesteps
        engine = self._engines.engine_for(self.denoiser, num_timesteps, self.device, backend, precision)
        pixels = check_keypoints(keypoints, self.skeleton, on_unusable)
        size = check_image_size(image_size, pixels)
        matrices = check_intrinsics(intrinsics, pixels.usable_keypoints)
        check_assumed_focal(assumed_focal)
        self._warn_of_other_steps(settings)
        views = self._views(size, matrices, assumed_focal, len(pixels.keypoints))
        # Once for all chunks: a hypothesis is the same bits in each of them.
        engine = engine.for_hypotheses(int(pixels.usable.sum()) * settings.num_hypotheses)
        ids = check_frame_ids(frame_ids, len(pixels.keypoints))
        self._warn_of_filled_joints(pixels)
        chunks = Chunks(
            self.config, self.pose_mean, self.pose_scale, engine, table, settings, seed, pixels, views, ids
        )  # fmt: skip
        hypotheses = chunks.run(progress)
        return LiftResult(
            hypotheses=hypotheses,
            keypoints_2d=pixels.keypoints,
            confidence=pixels.confidence,
            skeleton=self.skeleton,
            covariance_scale=self.covariance_scale,
            aggregation=settings.aggregation,
            translation=None if matrices is None else _translation(hypotheses, pixels, matrices),
            usable=pixels.usable,
            meta=chunks.meta(),
        )

    def _views(self, size: Tensor | None, matrices: Tensor | None, assumed_focal: float | None, batch: int) -> Views:
        """Return the cameras; a focal length is assumed where none is given and predictions are to be turned."""
        if size is None and self.needs_image_size(matrices is not None, assumed_focal):
            raise ValueError("image_size must be given as (w, h): this model needs it, got None")
        if matrices is not None:
            focal, center = (item.expand(batch, 2) for item in split_intrinsics(matrices))
            return Views(size, focal, center, camera_known=True)
        if size is None or assumed_focal is None or self.config.input_normalization != "person":
            return Views(size)  # screen coordinates are not turned: no focal length takes part
        focal = (assumed_focal * size.amax(dim=-1, keepdim=True)).expand(batch, 2)
        return Views(size, focal, size / 2, assumed_focal=assumed_focal)

    def _warn_of_other_steps(self, settings: SamplingConfig) -> None:
        names = ("sampler", "num_inference_steps", "eta", "timestep_spacing", "variance", "flip")
        other = [name for name in names if getattr(settings, name) != getattr(self.config.sampling, name)]
        count = settings.num_hypotheses * (2 if settings.flip else 1)
        if other and count >= MIN_HYPOTHESES and bool((self.covariance_scale != 1).any()):
            fitted = ", ".join(f"{name} {getattr(self.config.sampling, name)}" for name in other)
            warnings.warn(
                f"the covariance was calibrated for {fitted}: its regions may hold more or less than they say",
                stacklevel=4,  # past this method, __call__ and its decorator
            )

    def _warn_of_filled_joints(self, pixels: PixelInput) -> None:
        filled = int((~pixels.present[pixels.usable]).sum())
        if filled and self.config.denoiser.condition_channels == 2:
            warnings.warn(
                f"{filled} missing joints are filled by the mean pose: this model cannot know that they are missing",
                stacklevel=4,  # past this method, __call__ and its decorator
            )


def _translation(hypotheses: Tensor, pixels: PixelInput, matrices: Tensor) -> Tensor:
    """Return where the roots ``[B, H, 3]`` are, in metres; NaN where a row could not be lifted."""
    matrices = matrices.expand(len(hypotheses), 3, 3)
    translation = estimate_translation(hypotheses.cpu(), pixels.keypoints, pixels.confidence, matrices)
    translation[~pixels.usable] = torch.nan
    return translation
