"""What a run leaves on disk: checkpoints to resume from, the log, and the lifter to use."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffupose.checkpoint import load_torch_file, save_lifter_file
from diffupose.config import LifterConfig
from diffupose.errors import InputError
from diffupose.files import atomic_path
from diffupose.training.config import TrainConfig
from diffupose.training.ema import ExponentialMovingAverage

CHECKPOINT_NAME, LOG_NAME, LIFTER_NAME = "checkpoint.pt", "log.csv", "model.safetensors"
# Settings that may differ between the two halves of a resumed run.
_FREE_ON_RESUME = (
    "output", "device", "log_every", "checkpoint_every", "validate_every", "workers", "cuda_graph", "compile", "data",
)  # fmt: skip
LOG_COLUMNS = ("step", "samples", "epoch", "loss", "lr", "gradient_norm", "val_h36m_mm", "val_wild_mm", "seconds")


@dataclass
class RunState:
    """What changes in a run, and the statistics that it started with.

    Attributes:
        denoiser, ema, optimizer: What learns.
        pose_mean, pose_scale: ``[J, 3]`` metres.
        step: Optimiser steps that were taken.
        running: Sums since the last line of the log, their count, and the seconds of the whole run.
    """

    denoiser: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    pose_mean: Tensor
    pose_scale: Tensor
    step: int = 0
    running: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "gradient_norm": 0.0, "count": 0.0, "seconds": 0.0}
    )

    def count(self, loss: float, gradient_norm: float) -> None:
        """Count one optimiser step."""
        self.step += 1
        for name, value in (("loss", loss), ("gradient_norm", gradient_norm), ("count", 1)):
            self.running[name] += value

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a checkpoint, torch's generators as well."""
        self.denoiser.load_state_dict(saved["denoiser"])
        self.ema.model.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.running = int(saved["step"]), dict(saved["running"])
        torch.set_rng_state(saved["rng"].cpu())
        if torch.cuda.is_available() and len(saved["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([item.cpu() for item in saved["cuda_rng"]])


def save_checkpoint(folder: Path, state: RunState, config: TrainConfig, model: LifterConfig, num_samples: int) -> None:
    """Write the lifter of the averaged weights, then all that a run needs to resume to the same bits."""
    epoch, position = divmod(state.step * config.batch_size, num_samples)
    content = {
        "format": 1,
        "step": state.step,
        "train_config": json.dumps(config.to_dict()),
        "model_config": json.dumps(model.to_dict()),
        "denoiser": state.denoiser.state_dict(),
        "ema": state.ema.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "pose_mean": state.pose_mean,
        "pose_scale": state.pose_scale,
        "running": state.running,
        # Data and noise depend on the seed and the step only; the position is stored for a check.
        "sampler": {"seed": config.seed, "epoch": epoch, "position": position, "num_samples": num_samples},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    # The checkpoint comes last: a run killed before it resumes from the previous one and writes both again.
    save_lifter_file(folder / LIFTER_NAME, state.ema.model, model, state.pose_mean, state.pose_scale)
    with atomic_path(folder / CHECKPOINT_NAME) as temporary:
        torch.save(content, temporary)


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of ``save_checkpoint``.

    Raises:
        InputError: If the file is damaged or something else.
    """
    path = folder / CHECKPOINT_NAME
    state = load_torch_file(path, device, "cannot be read as a training checkpoint")
    if not isinstance(state, dict) or state.get("format") != 1:
        raise InputError(f"{path} is not a training checkpoint of diffupose")
    return state


def check_same_run(saved: dict[str, Any], config: TrainConfig, model: LifterConfig, num_samples: int) -> None:
    """Raise ``InputError`` unless a checkpoint is of a run with these settings, this model and as much data."""
    before = {**TrainConfig().to_dict(), **json.loads(saved["train_config"])}
    now = json.loads(json.dumps(config.to_dict()))
    for name, value in now.items():
        if name not in _FREE_ON_RESUME and before[name] != value:
            raise InputError(f"{name} was {before[name]!r} in the run to resume, got {value!r}")
    if LifterConfig.from_dict(json.loads(saved["model_config"])) != model:
        raise InputError("the model of the run to resume differs from the one asked for")
    if saved["sampler"]["num_samples"] != num_samples:
        raise InputError(
            f"the run to resume had {saved['sampler']['num_samples']} training poses, data has {num_samples}"
        )


class CsvLog:
    """A CSV with one row per logged step, cut back to the checkpoint when a run resumes."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        if resume_step and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if _is_complete(row) and int(row["step"]) <= resume_step]
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and push it to the system, so that a killed run keeps it."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)
            file.flush()
            os.fsync(file.fileno())


def _is_complete(row: dict[str, str]) -> bool:
    # A run that is killed while it writes leaves an incomplete last line.
    return None not in row and all(value is not None for value in row.values()) and row["step"].isdigit()
