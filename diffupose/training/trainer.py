"""Training (Algorithm 1): ``diffupose train``, or ``torchrun --nproc-per-node=N -m diffupose.train``."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffupose.config import LifterConfig
from diffupose.devices import find_device
from diffupose.errors import InputError
from diffupose.networks.build import LifterFile, build_denoiser, load_lifter_file
from diffupose.training.batches import NOISE_STREAM, Batches, TrainBatch, pose_statistics, step_generator
from diffupose.training.config import TrainConfig, learning_rate, model_config
from diffupose.training.distributed import average, average_gradients, start_processes, stop_processes, wait_for_all
from diffupose.training.ema import ExponentialMovingAverage
from diffupose.training.gradients import Gradients
from diffupose.training.loader import load_batches
from diffupose.training.loss import DiffusionLoss
from diffupose.training.sources import open_batches
from diffupose.training.state import (
    CHECKPOINT_NAME,
    LIFTER_NAME,
    LOG_NAME,
    CsvLog,
    RunState,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
)
from diffupose.training.validation import Validation


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Path:
    """Train a denoiser and return the path of the lifter, ``OUTPUT/model.safetensors``.

    Args:
        config: Settings.
        resume: Go on from ``OUTPUT/checkpoint.pt`` if it is there; on the same machine with the same thread count the
            weights end bit-identical to those of a run that was never stopped.
        progress: Show a progress bar.

    Raises:
        InputError: If the data or the checkpoint cannot be used, or OUTPUT holds a run and ``resume`` is not set.
        FloatingPointError: If the loss or the gradient is not finite.
    """
    rank, num_processes = start_processes(config.device)
    try:
        return _Trainer(config, rank, num_processes, resume).run(progress and rank == 0)
    finally:
        stop_processes()


class _Trainer:
    def __init__(self, config: TrainConfig, rank: int, num_processes: int, resume: bool) -> None:
        if config.batch_size % num_processes:
            raise ValueError(f"batch_size must be a multiple of {num_processes} processes, got {config.batch_size}")
        self.config, self.rank, self.num_processes = config, rank, num_processes
        self.device = find_device(config.device)
        if str(self.device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())  # that of this process
        self.folder = Path(config.output)
        if (self.folder / CHECKPOINT_NAME).exists() and not resume:
            raise InputError(f"{self.folder} already holds a run: resume it with --resume, or choose another --output")
        self.model = model_config(config)
        self.batches: Batches = open_batches(config, self.model, torch.device("cpu") if config.workers else self.device)
        self.validation = Validation(config) if rank == 0 and config.validate_every else None

        saved = None
        if resume and (self.folder / CHECKPOINT_NAME).exists():
            saved = load_checkpoint(self.folder, self.device)
            check_same_run(saved, config, self.model, self.batches.num_samples)
        elif resume and rank == 0:
            print(f"diffupose: {self.folder} holds no run to resume: starting from step 0", file=sys.stderr)
        if rank == 0:  # only now: a run that cannot start leaves no folder
            self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.denoiser = build_denoiser(self.model.denoiser).to(self.device)
        pose_mean, pose_scale = (item.to(self.device) for item in self._statistics(saved))
        self.loss = DiffusionLoss(self.model, config, pose_mean, pose_scale).to(self.device)
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        # One kernel on a GPU; on a CPU the other form keeps the bits of earlier runs.
        fused = True if self.device.type == "cuda" else None
        optimizer = kind(self.denoiser.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        ema = ExponentialMovingAverage(self.denoiser, config)
        self.state = RunState(self.denoiser, ema, optimizer, pose_mean, pose_scale)
        if saved is not None:
            self.state.restore(saved)
        self.network = torch.compile(self.denoiser) if config.compile else self.denoiser
        as_graph = config.cuda_graph and self.device.type == "cuda"
        self.gradients = Gradients(self._loss_of, self.denoiser.parameters(), as_graph)

    def _statistics(self, saved: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the poses ``[J, 3]``; a lifter to start from gives its weights as well."""
        if saved is not None:
            return saved["pose_mean"], saved["pose_scale"]
        if self.config.initialize is not None:
            file = _initial_lifter(self.config.initialize, self.model)
            self.denoiser.load_state_dict(file.denoiser.state_dict())
            return file.pose_mean, file.pose_scale
        if self.model.standardize_poses:
            return pose_statistics(self.batches)
        shape = self.batches.batch(0).poses_3d.shape[1:]
        return torch.zeros(shape), torch.ones(shape)

    def run(self, progress: bool) -> Path:
        config, state = self.config, self.state
        log = CsvLog(self.folder / LOG_NAME, state.step) if self.rank == 0 else None
        board = _tensorboard(self.folder, state.step) if self.rank == 0 else None
        bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress, mininterval=1.0)
        self.denoiser.train()
        clock = time.perf_counter()
        for batch in load_batches(self.batches, state.step, config.steps, config.workers, self.device):
            loss, norm = self._train_step(batch)
            state.count(loss, norm)
            bar.update()
            logged = state.step % config.log_every == 0 or self._validates
            if logged and log is not None:
                now = time.perf_counter()
                state.running["seconds"], clock = state.running["seconds"] + now - clock, now
                row = self._log_row()
                log.write(row)
                if board is not None:
                    for name, value in row.items():
                        if isinstance(value, float) and name != "seconds":
                            board.add_scalar(name, value, state.step)
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if logged:
                state.running |= {"loss": 0.0, "gradient_norm": 0.0, "count": 0.0}
            if self.rank == 0 and (state.step % config.checkpoint_every == 0 or state.step == config.steps):
                if board is not None:
                    board.flush()  # steps that the checkpoint counts must be logged
                save_checkpoint(self.folder, state, config, self.model, self.batches.num_samples)
        bar.close()
        if board is not None:
            board.close()
        wait_for_all(self.num_processes)
        return self.folder / LIFTER_NAME

    def _loss_of(self, condition: Tensor, poses_3d: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.loss(self.network, TrainBatch(condition, poses_3d), timesteps, noise)

    def _train_step(self, batch: TrainBatch) -> tuple[float, float]:
        """Take one optimiser step (Algorithm 1, lines 4 to 7) on the whole batch of all processes.

        Returns:
            Loss and gradient norm over all processes.
        """
        config, state, step = self.config, self.state, self.state.step
        share = config.batch_size // self.num_processes
        mine = slice(self.rank * share, (self.rank + 1) * share)
        generator = step_generator(config.seed, NOISE_STREAM, step, self.device)
        timesteps, noise = self.loss.draw(config.batch_size, generator)
        batch = batch[mine]
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.batches.num_samples)
        loss = self.gradients(batch.condition, batch.poses_3d, timesteps[mine], noise[mine])
        average_gradients(self.denoiser, self.num_processes)
        limit = config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), limit)
        values = {"loss": float(average(loss, self.num_processes)), "gradient norm": float(norm)}
        # Before the step: a value that is not finite would spoil the weights and the next checkpoint.
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value} at step {step}: try a smaller --lr or --grad-clip 1")
        state.optimizer.step()
        state.ema.update(self.denoiser, step + 1)
        return values["loss"], values["gradient norm"]

    @property
    def _validates(self) -> bool:
        every, step = self.config.validate_every, self.state.step
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _log_row(self) -> dict[str, Any]:
        config, state, num_samples = self.config, self.state, self.batches.num_samples
        row = {
            "step": state.step,
            "samples": state.step * config.batch_size,
            "epoch": state.step * config.batch_size / num_samples,
            "loss": state.running["loss"] / state.running["count"],
            "lr": learning_rate(config, state.step - 1, num_samples),
            "gradient_norm": state.running["gradient_norm"] / state.running["count"],
            "val_h36m_mm": "",
            "val_wild_mm": "",
            "seconds": state.running["seconds"],
        }
        if self.validation is not None and self._validates:
            row |= self.validation.score(state.ema.model, self.model, state.pose_mean, state.pose_scale)
        return row


def _initial_lifter(path: str, model: LifterConfig) -> LifterFile:
    file = load_lifter_file(path)
    for name in ("denoiser", "diffusion", "input_normalization", "standardize_poses"):
        given, wanted = getattr(file.config, name), getattr(model, name)
        if given != wanted:
            raise InputError(f"initialize must be a lifter of the same model; its {_difference(name, given, wanted)}")
    return file


def _difference(name: str, given: Any, wanted: Any) -> str:
    """Say how two settings differ; of those that have parts, in which of them."""
    if type(given) is not type(wanted) or not is_dataclass(given):
        return f"{name} is {given}, not {wanted}"
    names = [part.name for part in fields(given) if getattr(given, part.name) != getattr(wanted, part.name)]
    parts = [", ".join(f"{part}={getattr(values, part)!r}" for part in names) for values in (given, wanted)]
    return f"{name} is {parts[0]}, not {parts[1]}"


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: logging to CSV only (pip install diffupose[train])", file=sys.stderr)
        return None
    # TensorBoard hides what an earlier run logged from ``purge_step`` on.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
