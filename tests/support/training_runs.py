"""Made-up motion capture, and training runs through the command line in processes of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import diffupose
from diffupose.skeleton import H36M_17

# A person who stands and looks along x, z up, in metres.
STANDING = np.array([
    (0.0, 0.0, 0.95), (0.0, -0.13, 0.95), (0.03, -0.13, 0.5), (0.0, -0.13, 0.08), (0.0, 0.13, 0.95), (0.03, 0.13, 0.5),
    (0.0, 0.13, 0.08), (0.0, 0.0, 1.2), (0.0, 0.0, 1.45), (0.08, 0.0, 1.55), (0.02, 0.0, 1.68), (0.0, 0.16, 1.42),
    (0.0, 0.2, 1.15), (0.05, 0.2, 0.9), (0.0, -0.16, 1.42), (0.0, -0.2, 1.15), (0.05, -0.2, 0.9),
])  # fmt: skip
SUBJECTS = {"walker_01": 120, "walker_02": 60, "uiprmd_s10": 40}
ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def stick_figures(num_poses: int, generator: np.random.Generator, size: float = 1.0) -> np.ndarray:
    """Return poses ``[F, 17, 3]`` with every bone turned by random angles."""
    poses = np.repeat(size * STANDING[None], num_poses, axis=0)
    for parent, child in H36M_17.edges:
        bone = size * (STANDING[child] - STANDING[parent])
        axis = generator.normal(0.0, 0.3, (num_poses, 3))  # the rotation vector
        angle = np.linalg.norm(axis, axis=1, keepdims=True)
        axis /= angle
        along = (axis @ bone)[:, None] * axis
        turned = np.cos(angle) * (bone - along) + np.sin(angle) * np.cross(axis, bone) + along
        poses[:, child] = poses[:, parent] + turned
    return poses + generator.normal(0.0, 1.0, (num_poses, 1, 3)) * (1.0, 1.0, 0.0)


def write_mocap(path: Path, subjects: dict[str, int] | None = None) -> Path:
    """Write motion capture of made-up people."""
    subjects = SUBJECTS if subjects is None else subjects
    generator = np.random.default_rng(0)
    poses = [stick_figures(count, generator, 0.9 + 0.1 * index) for index, count in enumerate(subjects.values())]
    np.savez(
        path,
        positions=np.concatenate(poses).astype(np.float32),
        clip_index=np.repeat(np.arange(len(subjects)), list(subjects.values())),
        clip_subject=np.array(list(subjects)),
        clip_source=np.array(["made_up"] * len(subjects)),
    )
    return path


def environment() -> dict[str, str]:
    """Return an environment in which child processes import this diffupose, on one thread."""
    source = str(Path(diffupose.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **ON_ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}


def to_flags(settings: dict[str, object]) -> list[str]:
    """Return settings as command-line flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def start_train(settings: dict[str, object], *, resume: bool = False, script: str | None = None) -> subprocess.Popen:
    """Start ``diffupose train``; ``script`` runs before it in the same process."""
    command = [sys.executable, "-m", "diffupose.cli"]
    if script is not None:
        command = [sys.executable, "-c", f"{script}\nimport sys\nfrom diffupose.cli import main\nsys.exit(main())"]
    command += ["train", *to_flags(settings), "--quiet", *(["--resume"] if resume else [])]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for a process, check its exit status and return what it printed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return output + errors


def run_train(settings: dict[str, object], **options: object) -> str:
    """Run ``diffupose train`` to its end."""
    return finish(start_train(settings, **options))


def read_log(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's CSV."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_checkpoint(folder: Path) -> dict:
    """Return a run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read_board(folder: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """Return the points TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]
