"""What a run leaves on disk: checkpoints to resume from, the log, and the lifter to use."""

from __future__ import annotations

import csv
import json
import os
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
LOG_COLUMNS = ("step", "samples", "epoch", "loss", "lr", "gradient_norm", "val_h36m_mm", "val_wild_mm", "seconds")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    config: TrainConfig,
    model: LifterConfig,
    denoiser: nn.Module,
    ema: ExponentialMovingAverage,
    optimizer: torch.optim.Optimizer,
    pose_mean: Tensor,
    pose_scale: Tensor,
    running: dict[str, float],
    num_samples: int,
) -> None:
    """Write the lifter of the averaged weights, then everything a run needs to go on as if it had never stopped."""
    epoch, position = divmod(step * config.batch_size, num_samples)
    state = {
        "format": 1,
        "step": step,
        "train_config": json.dumps(config.to_dict()),
        "model_config": json.dumps(model.to_dict()),
        "denoiser": denoiser.state_dict(),
        "ema": ema.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pose_mean": pose_mean,
        "pose_scale": pose_scale,
        "running": running,
        # Data and noise depend on the seed and the step only; where the shuffle stands is stored to be checked.
        "sampler": {"seed": config.seed, "epoch": epoch, "position": position, "num_samples": num_samples},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    # The checkpoint comes last: a run killed in between goes on from the one before and writes both again.
    save_lifter_file(folder / LIFTER_NAME, ema.model, model, pose_mean, pose_scale)
    with atomic_path(folder / CHECKPOINT_NAME) as temporary:
        torch.save(state, temporary)


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


def restore_rng(state: dict[str, Any]) -> None:
    """Put torch's generators where they were."""
    torch.set_rng_state(state["rng"].cpu())
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda_rng"]])


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
    # A run killed while it wrote leaves a torn last line.
    return None not in row and all(value is not None for value in row.values()) and row["step"].isdigit()
