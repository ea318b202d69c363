"""What describes a lifter: plain dataclasses, stored as JSON in every checkpoint, and the presets."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffupose.errors import check_choice
from diffupose.schedule import BetaSchedule, PredictionType, Sampler, TimestepSpacing, Variance
from diffupose.skeleton import SKELETONS, Normalization

# A larger number is a typing error and would run out of memory.
_MOST_HYPOTHESES = 1_000_000

Architecture = Literal["modulated_gcn", "parallel_gcn"]
TimeBlocks = Literal["after", "between"]
InputNormalization = Literal["image", "person"]
Aggregation = Literal["mean", "medoid", "density"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DenoiserConfig:
    """The network.

    Attributes:
        architecture: ``"modulated_gcn"`` (the released network) or ``"parallel_gcn"`` (graph convolutions beside
            attention, time in every block).
        skeleton: Name of the skeleton.
        condition_channels: 2 (x, y) or 3 (x, y and presence).
        camera_cue: Four more condition channels, the same for all joints: whether the intrinsics are known, and if so
            the log of the person's angular size and the direction of the person from the optical axis.
        hidden_dim: Width d.
        num_layers: Residual graph blocks.
        num_heads: Attention heads of ``"parallel_gcn"``; 0 for none.
        dropout: Dropout after each graph convolution.
        adjacency_normalization: ``"row"`` (released) or ``"symmetric"`` (paper).
        adjacency_mask: Learn the multiplicative mask P of eq. 7 (A * P + Q); off in the released network.
        time_blocks: ``"after"`` the trunk (released) or ``"between"`` its blocks (paper); ``"modulated_gcn"`` only.
        time_in_every_block: Otherwise only the last block sees the timestep; ``"parallel_gcn"`` only.
    """

    architecture: Architecture = "modulated_gcn"
    skeleton: str = "h36m_17"
    condition_channels: int = 2
    camera_cue: bool = False
    hidden_dim: int = 384
    num_layers: int = 4
    num_heads: int = 4
    dropout: float = 0.0
    adjacency_normalization: Normalization = "row"
    adjacency_mask: bool = False
    time_blocks: TimeBlocks = "after"
    time_in_every_block: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        check_choice("skeleton", self.skeleton, tuple(SKELETONS))
        check_choice("condition_channels", self.condition_channels, (2, 3))
        if self.architecture == "modulated_gcn" and not self.time_in_every_block:
            raise ValueError("time_in_every_block must be true with architecture modulated_gcn, got False")
        _whole("hidden_dim", self.hidden_dim, 1)
        _whole("num_layers", self.num_layers, 1)
        _whole("num_heads", self.num_heads, 0)
        _number("dropout", self.dropout, 0.0, 0.999)
        # The released time embedding has d/16 frequencies, spaced over d/16 - 1 gaps.
        if self.architecture == "modulated_gcn" and (self.hidden_dim % 16 or self.hidden_dim < 32):
            raise ValueError(f"hidden_dim must be a multiple of 16 and at least 32, got {self.hidden_dim}")
        if self.architecture == "parallel_gcn" and self.hidden_dim % (2 * max(1, self.num_heads)):
            raise ValueError(f"hidden_dim must be a multiple of 2 * num_heads, got {self.hidden_dim}")

    @property
    def num_condition_channels(self) -> int:
        """Channels of the condition that the network takes."""
        return self.condition_channels + (4 if self.camera_cue else 0)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts.

    Attributes:
        num_train_timesteps: T.
        beta_schedule: ``"cosine"`` or ``"linear"``.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        clip_sample_range: Limit of x0 in data units, or None.
        deterministic: No diffusion: the network regresses x0 from x_T = 0 at the last timestep, in one call. A baseline
            whose hypotheses are all the same.
    """

    num_train_timesteps: int = 100
    beta_schedule: BetaSchedule = "cosine"
    prediction_type: PredictionType = "epsilon"
    clip_sample_range: float | None = 1.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        _whole("num_train_timesteps", self.num_train_timesteps, 1)
        if self.clip_sample_range is not None:
            _number("clip_sample_range", self.clip_sample_range, 1e-6, 1e6)
        if self.deterministic and self.prediction_type != "sample":
            raise ValueError(f"prediction_type must be sample where deterministic is set, got {self.prediction_type!r}")


def check_antithetic(value: object) -> None:
    """Raise unless an option that was removed is off: files of 0.1.0 store it as false."""
    if value is not False:
        raise ValueError(
            "antithetic must be False: pairs of opposite noise were removed, since hypotheses that are not independent "
            f"have no valid covariance; got {value!r}"
        )


@dataclass(frozen=True)
class SamplingConfig:
    """The defaults of a lift; a call can change each of them.

    ``variance`` is ``"fixed_small"``, or ``"analytic"`` for checkpoints that hold their prediction error (see
    ``step_table``). ``antithetic`` is always False: files of 0.1.0 hold it.
    """

    sampler: Sampler = "ddpm"
    num_inference_steps: int = 100
    eta: float = 0.0
    timestep_spacing: TimestepSpacing = "trailing"
    variance: Variance = "fixed_small"
    num_hypotheses: int = 10
    flip: bool = True
    antithetic: bool = False
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        check_antithetic(self.antithetic)
        check_choices(self)
        if self.variance == "analytic" and self.sampler == "dpm++":
            raise ValueError("variance must be fixed_small with sampler dpm++, got 'analytic'")
        _whole("num_inference_steps", self.num_inference_steps, 1)
        _whole("num_hypotheses", self.num_hypotheses, 1)
        if self.num_hypotheses > _MOST_HYPOTHESES:
            raise ValueError(f"num_hypotheses must be at most {_MOST_HYPOTHESES}, got {self.num_hypotheses}")
        _number("eta", self.eta, 0.0, 1.0)


@dataclass(frozen=True)
class LifterConfig:
    """Everything about a lifter except its weights.

    Attributes:
        denoiser: The network.
        diffusion: The forward process.
        sampling: Defaults of a lift.
        input_normalization: ``"image"`` (the paper's screen coordinates) or ``"person"`` (the person's box, and the
            pose as seen by a camera turned towards the person).
        standardize_poses: Diffuse (pose - mean) / deviation per joint and axis of the training set instead of metres.
        name: Name of the preset.
    """

    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    input_normalization: InputNormalization = "image"
    standardize_poses: bool = False
    name: str = "paper"

    def __post_init__(self) -> None:
        check_choices(self)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LifterConfig:
        """Build from ``to_dict`` output.

        Raises:
            ValueError: If a key is unknown or a value out of its range.
        """
        sections = {"denoiser": DenoiserConfig, "diffusion": DiffusionConfig, "sampling": SamplingConfig}
        values = _known_keys(cls, values)
        for key, section in sections.items():
            if key in values:
                values[key] = section(**_known_keys(section, values[key]))
        return cls(**values)


def check_choices(settings: Any) -> None:
    """Raise ``ValueError`` unless all settings of a dataclass that are bools or literals have one of their values."""
    for name, choices in _choices(settings.__class__).items():
        check_choice(name, getattr(settings, name), choices)


@cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(cls).items()
    literals = {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}
    return literals | {name: (False, True) for name, hint in hints if hint is bool}


def override(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return ``LifterConfig.to_dict`` output with settings such as ``denoiser.num_heads=2`` replaced.

    Raises:
        ValueError: If there is no such setting.
    """
    values = copy.deepcopy(values)
    for item in settings:
        key, equals, text = item.partition("=")
        section, _, name = key.rpartition(".")
        target = values.get(section) if section else values
        if not equals or not isinstance(target, dict) or name not in target or isinstance(target[name], dict):
            raise ValueError(f"model settings must look like denoiser.num_heads=2 and exist, got {item!r}")
        try:
            target[name] = json.loads(text)
        except json.JSONDecodeError:
            target[name] = text
    return values


def _known_keys(cls: type, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} must be a mapping, got {type(values).__name__}")
    known = {item.name for item in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return dict(values)


def _whole(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}")


# The released network, exactly: row-normalised adjacency, no mask P, time only after the trunk, metres clipped to 1.
PAPER = LifterConfig()

# Graph convolutions beside attention, with the time in every block. The network predicts standardised x0, and few steps
# are enough. One hour on a CPU trains it better than many hours train the released recipe.
PARALLEL = LifterConfig(
    denoiser=DenoiserConfig(
        architecture="parallel_gcn", condition_channels=3, hidden_dim=96, adjacency_normalization="symmetric"
    ),
    diffusion=DiffusionConfig(num_train_timesteps=1000, prediction_type="sample", clip_sample_range=None),
    sampling=SamplingConfig(sampler="ddim", num_inference_steps=10, flip=False),
    input_normalization="person",
    standardize_poses=True,
    name="parallel",
)

# The bundled model: PARALLEL, wider. Kernels are built for this architecture, so it does not change.
BASE = replace(PARALLEL, denoiser=replace(PARALLEL.denoiser, hidden_dim=128), name="base")

PRESETS = {"paper": PAPER, "parallel": PARALLEL, "base": BASE}
