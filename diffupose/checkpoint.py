"""Lifters on disk: our safetensors files, and the checkpoints of the released code.

Here they are a configuration and tensors; ``networks/build.py`` makes the network.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffupose.config import PAPER, DenoiserConfig, LifterConfig
from diffupose.errors import InputError
from diffupose.files import atomic_path
from diffupose.schedule import BETA_SCHEDULES, NoiseSchedule
from diffupose.skeleton import SKELETONS, skeleton_by_num_joints

FORMAT = "diffupose-1"
_RESERVED = ("pose_mean", "pose_scale", "covariance_scale")


@dataclass(frozen=True)
class LifterTensors:
    """What a checkpoint holds.

    Attributes:
        config: The model.
        state: The tensors of the network by their names, not yet compared with those that the network has.
        statistics: ``pose_mean``, ``pose_scale`` and ``covariance_scale``, and ``prediction_error`` where somebody
            measured it; see ``networks.build.LifterFile``.
    """

    config: LifterConfig
    state: dict[str, Tensor]
    statistics: dict[str, Tensor]


def save_lifter_file(
    path: str | os.PathLike[str],
    denoiser: nn.Module,
    config: LifterConfig,
    pose_mean: Tensor,
    pose_scale: Tensor,
    covariance_scale: Tensor | None = None,
    prediction_error: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a lifter as safetensors with its configuration as metadata; ``dtype`` may be float16 to halve the file."""
    if covariance_scale is None:
        covariance_scale = torch.ones(pose_mean.shape[0])
    statistics = {"pose_mean": pose_mean, "pose_scale": pose_scale, "covariance_scale": covariance_scale}
    if prediction_error is not None:
        statistics["prediction_error"] = prediction_error
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in statistics.items()}
    for name, value in denoiser.state_dict().items():
        value = value.detach().to("cpu", dtype) if value.is_floating_point() else value.cpu()
        tensors[f"denoiser.{name}"] = value.contiguous()
    with atomic_path(path) as temporary:
        # Not save_file, which lets nobody but the owner read the file.
        content = save(tensors, {"format": FORMAT, "config": json.dumps(config.to_dict(), sort_keys=True)})
        temporary.write_bytes(_with_sorted_metadata(content))


def _with_sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library's changes from process to process."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read_lifter_file(path: str | os.PathLike[str]) -> LifterTensors:
    """Read a lifter: our safetensors, or a checkpoint of the released code (``best_model.pt``, ``model-k.pt``).

    No pickle is run: the released files are read with ``weights_only=True``.

    Raises:
        InputError: If the file is damaged, or holds something else.
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    with open(path, "rb") as file:
        start = file.read(16)
    # A safetensors file is a length (8 bytes) and a JSON object; torch writes zip archives or, long ago, pickles.
    if start[8:9] == b"{":
        return _load_safetensors(path)
    return _load_released(path)


def _load_safetensors(path: Path) -> LifterTensors:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):
        # What the library says is about its buffers.
        raise InputError(f"{path} is damaged: too short or too long, or not a safetensors file at all") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a diffupose checkpoint: its format is {metadata.get('format')!r}")
    try:
        config = LifterConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a configuration that cannot be used: {error}") from None
    missing = [name for name in _RESERVED if name not in tensors]
    if missing:
        raise InputError(f"{path} has no tensor {missing[0]!r}")
    num_joints = SKELETONS[config.denoiser.skeleton].num_joints
    shapes: dict[str, tuple[int, ...]] = {
        "pose_mean": (num_joints, 3),
        "pose_scale": (num_joints, 3),
        "covariance_scale": (num_joints,),
        "prediction_error": (config.diffusion.num_train_timesteps, num_joints, 3),
    }
    statistics = {name: tensors.pop(name).float() for name in shapes if name in tensors}
    for name, value in statistics.items():
        shape = shapes[name]
        if tuple(value.shape) != shape:
            raise InputError(f"{name} in {path} must be finite, of shape {list(shape)}, got {list(value.shape)}")
        least = {"pose_mean": -math.inf, "covariance_scale": torch.finfo(torch.float32).tiny}.get(name, 0.0)
        right = torch.isfinite(value) & (value >= least)
        if not bool(right.all()):
            expected = {"pose_mean": "finite", "covariance_scale": "finite and positive"}.get(
                name, "finite and not negative"
            )
            raise InputError(f"{name} in {path} must be {expected}, got {float(value[~right][0]):g}")
    return LifterTensors(config, {name.removeprefix("denoiser."): value for name, value in tensors.items()}, statistics)


# The released network's names (left, as regular expressions) and ours. block3 is never called: accepted and dropped.
_RELEASED_NAMES = (
    (r"gconv_input\.0\.", "gconv_input."),
    (r"(gconv_layers\.\d+)\.gconv1\.", r"\1.0."),
    (r"(gconv_layers\.\d+)\.gconv2\.", r"\1.1."),
    (r"\.W$", ".weight"),
    (r"\.M$", ".modulation"),
    (r"\.adj2$", ".adjacency_offset"),
    (r"non_local\.W\.0\.", "non_local.out."),
    (r"non_local\.W\.1\.", "non_local.bn."),
    (r"time_mlp\.1\.", "time_mlp.linear1."),
    (r"time_mlp\.3\.", "time_mlp.linear2."),
    (r"block1\.mlp\.1\.", "time_blocks.0.linear."),
    (r"block2\.mlp\.1\.", "time_blocks.1.linear."),
)
_PREFIX = "denoise_fn."


def _load_released(path: Path) -> LifterTensors:
    content = load_torch_file(path, "cpu", "is neither a diffupose checkpoint nor one of the released code")
    if isinstance(content, dict) and "train_config" in content:
        raise InputError(
            f"{path} is the state of a training run, to go on from; its lifter is {path.parent / 'model.safetensors'}"
        )
    state = _averaged_weights(content)
    if state is None or f"{_PREFIX}gconv_input.0.gconv.W" not in state:
        raise InputError(f"{path} holds no weights of the released network (no 'ema' or 'model' entry with them)")
    try:
        return _convert_released(state, path)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path} lacks {error} of the released network") from None
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} does not hold the released network as it should be: {error}") from None


def load_torch_file(path: Path, device: str | torch.device, problem: str) -> Any:
    """Read what ``torch.save`` wrote, without running any code in it.

    Raises:
        InputError: If that fails: the path, ``problem``, and why. Torch's own words would be about its insides, and the
            advice to run the code.
        OSError: If the file cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that torch did not write
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged archives and pickles raise a dozen kinds of error
        reason = "it is damaged or something else"
        if isinstance(error, pickle.UnpicklingError):
            code = "a pickle with objects or code in it, which are never loaded"
            reason = f"it is {code}" if start == b"PK" else f"it is damaged, or {code}"
        raise InputError(f"{path} {problem}: {reason}") from None


def _averaged_weights(content: Any) -> dict[str, Tensor] | None:
    """Return the averaged weights if there are any, else the plain ones, without the prefixes of their wrappers."""
    if not isinstance(content, dict):
        return None
    for key, prefixes in (("ema", ("ema_model.module.", "ema_model.")), ("model", ("module.", "")), (None, ("",))):
        entries = content if key is None else content.get(key)
        for prefix in prefixes:
            if isinstance(entries, dict) and any(str(name).startswith(prefix + _PREFIX) for name in entries):
                return {
                    name.removeprefix(prefix): value
                    for name, value in entries.items()
                    if str(name).startswith(prefix) and isinstance(value, Tensor)
                }
    return None


def _convert_released(state: dict[str, Tensor], path: Path) -> LifterTensors:
    first = state[f"{_PREFIX}gconv_input.0.gconv.W"]
    num_joints, hidden_dim = state[f"{_PREFIX}gconv_input.0.gconv.M"].shape
    layers = {match[1] for name in state if (match := re.match(rf"{re.escape(_PREFIX)}gconv_layers\.(\d+)\.", name))}
    try:
        skeleton = skeleton_by_num_joints(num_joints)
        denoiser_config = DenoiserConfig(
            skeleton=skeleton.name,
            hidden_dim=hidden_dim,
            num_layers=len(layers),
            condition_channels=int(first.shape[1]) - 3,
        )
    except ValueError as error:
        raise InputError(f"{path} is not a network this version knows: {error}") from None
    betas = state["betas"].double().numpy()
    config = replace(
        PAPER,
        denoiser=denoiser_config,
        diffusion=replace(PAPER.diffusion, num_train_timesteps=len(betas), beta_schedule=_beta_schedule(betas, path)),
        sampling=replace(PAPER.sampling, num_inference_steps=len(betas)),
    )
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else ""
        if not name or name.startswith("block3."):
            continue
        for pattern, replacement in _RELEASED_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("non_local.") and value.ndim == 4:
            value = value.flatten(1)  # 1x1 convolutions are linear layers
        renamed[name] = value
    ones = torch.ones(num_joints, 3)
    statistics = {"pose_mean": torch.zeros(num_joints, 3), "pose_scale": ones, "covariance_scale": ones[:, 0].clone()}
    return LifterTensors(config, renamed, statistics)


def _beta_schedule(betas: np.ndarray, path: Path) -> Any:
    for name in BETA_SCHEDULES:
        if np.allclose(NoiseSchedule(len(betas), name).betas, betas, rtol=1e-4, atol=1e-6):
            return name
    raise InputError(f"betas in {path} follow neither the cosine nor the linear schedule")
