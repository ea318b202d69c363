"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffupose.config import PRESETS, LifterConfig, Precision, check_choices, override
from diffupose.datasets.mocap import SELECTION_SUBJECTS
from diffupose.errors import InputError, check_choice

Loss = Literal["l1", "mse"]
LearningRateSchedule = Literal["exponential", "cosine", "constant"]
Optimizer = Literal["adam", "adamw"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the paper's recipe.

    Attributes:
        preset: Model preset and the recipe that goes with it.
        model: Other settings of the model, such as ``denoiser.num_heads=2`` or ``standardize_poses=false``.
        data: Motion-capture npz, or the community's ``data_3d_h36m.npz``.
        initialize: Lifter whose weights and pose statistics the run starts from; the model must be the same.
        keypoints: ``data_2d_h36m_*.npz`` for Human3.6M; without it, the projected ground truth.
        output: Folder of the run: the lifter, ``checkpoint.pt`` and the log.
        hidden_dim: Width of the network, if not the preset's.
        num_layers: Blocks of the network, if not as many as the preset's.
        input_normalization: ``person`` or ``image``, if not the preset's.
        exclude_subjects: People never trained on.
        balance_subjects: Draw people by the inverse square root of how many poses they have, instead of every pose
            once an epoch.
        steps: Optimiser steps.
        batch_size: Poses a step, over all processes.
        lr: Learning rate.
        lr_schedule: ``exponential`` multiplies it by ``lr_decay`` every epoch, ``cosine`` takes it to 0 at the last
            step.
        lr_decay: What ``exponential`` multiplies by.
        warmup_steps: Steps in which the learning rate rises from 0.
        optimizer: ``adam`` or ``adamw``.
        weight_decay: Of ``adamw``, or as an L2 penalty of ``adam``.
        grad_clip: Largest norm of the gradient; 0 for none.
        loss: ``l1`` (paper) or ``mse``.
        joint_weights: Weigh limbs 2 and their ends 4, as the released code does.
        reconstruction_weight: λ of eq. 10.
        mirror: Augmentation: flipped samples.
        vary_bodies: Augmentation: other lengths of bones.
        vary_cameras: Augmentation: the wide ranges of cameras.
        exchange_limbs: Probability that an arm, or the legs, take the directions of another person's.
        noise_scale: Upper end of the detector noise level, in evaluation levels, at most 10; 0 leaves keypoints exact.
        missing_scale: Upper end of the level at which joints are missing, likewise; without it, ``noise_scale``.
        ema_decay: Decay of the averaged weights: min(ema_decay, 1 - (1 + n)^-ema_power) n steps after ``ema_start``.
        ema_every: Steps between two averages.
        ema_start: Steps before the first average.
        ema_power: A larger power lets the decay rise sooner.
        seed: Seed of weights, data and noise.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ...
        log_every: Steps between two lines of the log.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations; 0 means never.
        workers: Processes that draw batches on the CPU, ahead of time; 0 draws them on the training device. On a GPU
            drawing takes longer than an optimiser step: use 4, say.
        cuda_graph: On a GPU, replay each step's gradients as a CUDA graph.
        compile: Compile the network with ``torch.compile``.
        precision: ``bfloat16`` takes the matrix products of the network in bfloat16 (weights, loss and averages stay
            float32): twice as fast on CPUs with AVX512-BF16 and on GPUs, slower on others.
    """

    preset: str = "paper"
    model: tuple[str, ...] = ()
    data: str = ""
    initialize: str | None = None
    keypoints: str | None = None
    output: str = "runs/paper"
    hidden_dim: int | None = None
    num_layers: int | None = None
    input_normalization: str | None = None
    exclude_subjects: tuple[str, ...] = SELECTION_SUBJECTS
    balance_subjects: bool = False
    steps: int = 310_000
    batch_size: int = 2048
    lr: float = 4e-5
    lr_schedule: LearningRateSchedule = "exponential"
    lr_decay: float = 0.995
    warmup_steps: int = 0
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    loss: Loss = "l1"
    joint_weights: bool = True
    reconstruction_weight: float = 0.8
    mirror: bool = True
    vary_bodies: bool = True
    vary_cameras: bool = True
    exchange_limbs: float = 0.0
    noise_scale: float = 2.0
    missing_scale: float | None = None
    ema_decay: float = 0.995
    ema_every: int = 10
    ema_start: int = 100
    ema_power: float = 2 / 3
    seed: int = 0
    device: str = "auto"
    log_every: int = 50
    checkpoint_every: int = 1000
    validate_every: int = 0
    workers: int = 0
    cuda_graph: bool = True
    compile: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_choices(self)
        check_choice("preset", self.preset, tuple(PRESETS))
        for name in ("steps", "batch_size", "ema_every", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "lr_decay", "ema_power"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "ema_start", "validate_every", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        # At a higher level some people would have no joint left.
        for name in ("noise_scale", "missing_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 10:
                raise ValueError(f"{name} must be between 0 and 10, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if not 0 <= self.exchange_limbs <= 1:
            raise ValueError(f"exchange_limbs must be in [0, 1], got {self.exchange_limbs}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


# The settings that go with each model preset where they differ from the paper's recipe.
_PARALLEL_RECIPE: dict[str, Any] = {
    "output": "runs/parallel",
    "steps": 12_000,
    "batch_size": 128,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 200,
    "optimizer": "adamw",
    "weight_decay": 1e-2,
    "grad_clip": 1.0,
    "loss": "mse",
    "joint_weights": False,
    "balance_subjects": True,
    "ema_decay": 0.9995,
    "ema_every": 1,
    "ema_power": 0.75,
}
PRESET_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "parallel": _PARALLEL_RECIPE,
    "base": {**_PARALLEL_RECIPE, "output": "runs/base", "steps": 40_000},
}


def make_train_config(values: dict[str, Any]) -> TrainConfig:
    """Return a configuration: defaults, then the preset's recipe, then ``values``.

    Raises:
        ValueError: If a key is unknown, of the wrong type, or out of range.
    """
    types = {item.name: item.type for item in dataclasses.fields(TrainConfig)}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"there is no training setting {key!r}; there are {', '.join(sorted(types))}")
        _check_type(key, value, str(types[key]))
    preset = values.get("preset", "paper")
    merged = {**PRESET_RECIPES.get(preset, {}), **values}
    for name in ("exclude_subjects", "model"):
        if name in merged:
            merged[name] = tuple(merged[name])
    return TrainConfig(**merged)


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read settings from a TOML or JSON file.

    Raises:
        InputError: If the file cannot be parsed or is not a table of settings.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be parsed: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a table of settings, got {type(values).__name__}")
    return values


def _check_type(key: str, value: Any, annotation: str) -> None:
    kinds = {"bool": (bool,), "int": (int,), "float": (float, int), "tuple": (list, tuple)}
    accepted: tuple[type, ...] = next((kinds[kind] for kind in kinds if annotation.startswith(kind)), (str,))
    optional = "None" in annotation and value is None
    if not optional and (not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted)):
        raise ValueError(f"{key} must be {annotation}, got {value!r}")


def model_config(config: TrainConfig) -> LifterConfig:
    """Return the model that a training configuration describes."""
    values = PRESETS[config.preset].to_dict()
    for section, name in (
        (values["denoiser"], "hidden_dim"),
        (values["denoiser"], "num_layers"),
        (values, "input_normalization"),
    ):
        if getattr(config, name) is not None:
            section[name] = getattr(config, name)
    return LifterConfig.from_dict(override(values, config.model))


def learning_rate(config: TrainConfig, step: int, num_samples: int) -> float:
    """Return the learning rate of a step (counted from 0)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "exponential":
        return config.lr * warmup * config.lr_decay ** (step * config.batch_size // num_samples)
    if config.lr_schedule == "cosine":
        return config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
    return config.lr * warmup
