"""A run that is killed and resumed ends as one that was never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import (
    finish,
    read_board,
    read_checkpoint,
    read_log,
    run_train,
    start_train,
)

STEPS, CHECKPOINT_EVERY, LOG_EVERY = 60, 20, 3

# Dies in the middle of the second checkpoint's bytes.
DIE_IN_A_CHECKPOINT = """
import io, os, signal, torch
save = torch.save
def torn_save(state, path):
    if state["step"] < 40:
        return save(state, path)
    buffer = io.BytesIO()
    save(state, buffer)
    with open(path, "wb") as file:
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn_save
"""


@pytest.fixture(scope="module")
def settings(mocap_path):
    """Return the settings of a preset's runs."""

    def make(preset: str, folder: Path) -> dict[str, object]:
        return {
            "preset": preset, "data": mocap_path, "output": folder, "hidden_dim": 32, "num_layers": 1, "device": "cpu",
            "steps": STEPS, "batch_size": 96, "checkpoint_every": CHECKPOINT_EVERY, "log_every": LOG_EVERY,
            "ema_every": 1, "ema_start": 5, "grad_clip": 1.0, "lr": 1e-3,
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """Return the folder of a preset's run that nobody stopped; it runs once."""
    folders = {}

    def run(preset: str) -> Path:
        if preset not in folders:
            folder = tmp_path_factory.mktemp(preset)
            run_train(settings(preset, folder))
            folders[preset] = folder
        return folders[preset]

    return run


def saved_step(folder: Path) -> int:
    """Return the step of the checkpoint; 0 where there is none."""
    return read_checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0


def logged_steps(folder: Path) -> list[int]:
    """Return the steps of the CSV's complete lines."""
    lines = (folder / "log.csv").read_text().splitlines(keepends=True) if (folder / "log.csv").exists() else []
    return [int(line.split(",")[0]) for line in lines[1:] if line.endswith("\n")]


def kill_when(process, folder: Path, ready) -> tuple[int, int]:
    """Kill a run with SIGKILL once ``ready(saved, last logged)``; return both.

    The run is stopped while it is looked at, so what was seen is what it dies with.
    """
    looked_at = None
    while process.poll() is None:
        names = [folder / "checkpoint.pt", folder / "log.csv"]
        state = [path.stat().st_mtime_ns if path.exists() else 0 for path in names]
        if state == looked_at:
            time.sleep(0.001)
            continue
        looked_at = state
        os.kill(process.pid, signal.SIGSTOP)
        seen = saved_step(folder), (logged_steps(folder) or [0])[-1]
        if ready(*seen):
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            return seen
        os.kill(process.pid, signal.SIGCONT)
    raise AssertionError(f"the run ended before it could be killed: {process.communicate()}")


def assert_equal(one, other, name: str) -> None:
    """Compare nested containers of tensors bit by bit."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, dict):
        assert list(one) == list(other), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{name}[{index}]")
    else:
        assert one == other, name


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compare two finished runs: checkpoint, lifter, CSV, TensorBoard."""
    one, other = read_checkpoint(folder), read_checkpoint(expected)
    assert one["step"] == STEPS
    for state in (one, other):
        state.pop("train_config")  # names the output folder
        assert state["running"].pop("seconds") > 0
    assert_equal(one, other, "checkpoint")
    assert_equal(*(load_file(path / "model.safetensors") for path in (folder, expected)), "lifter")
    rows = [[{**row, "seconds": ""} for row in read_log(path)] for path in (folder, expected)]
    assert rows[0] == rows[1]
    assert [int(row["step"]) for row in rows[0]] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    assert read_board(folder) == read_board(expected)
    np.testing.assert_allclose(
        read_board(folder), [(int(row["step"]), float(row["loss"])) for row in rows[0]], rtol=1e-6
    )


# When to kill, by the step of the checkpoint and the last step of the CSV.


def before_a_checkpoint(saved: int, logged: int) -> bool:
    return saved == 0 and logged >= 9


def after_a_checkpoint(saved: int, logged: int) -> bool:
    return saved == 20 and logged < 24


def ahead(saved: int, logged: int) -> bool:
    return saved == 20 and logged >= 30


def cut_back(saved: int, logged: int) -> bool:
    return saved == 20 and logged == 18


@pytest.mark.parametrize(
    ("preset", "kills"),
    [
        pytest.param("paper", [before_a_checkpoint, after_a_checkpoint, ahead, cut_back], marks=pytest.mark.slow),
        ("parallel", [after_a_checkpoint, ahead]),
    ],
    ids=["paper", "parallel"],
)
def test_sigkill(settings, uninterrupted, tmp_path, preset, kills):
    run = settings(preset, tmp_path)
    seen = []
    for index, ready in enumerate(kills):
        seen.append(kill_when(start_train(run, resume=index > 0), tmp_path, ready))
        assert logged_steps(tmp_path) == list(range(LOG_EVERY, seen[-1][1] + 1, LOG_EVERY))
    print(f"{preset}: killed with (checkpoint, CSV) at {seen}")
    if cut_back in kills:
        # Before training went on, the CSV lost what the checkpoint did not know.
        assert seen[-2][1] >= 30 and seen[-1][1] == 18
    run_train(run, resume=True)
    assert_same_run(tmp_path, uninterrupted(preset))


@pytest.mark.slow
def test_sigkill_within_a_checkpoint(settings, uninterrupted, tmp_path):
    run = settings("paper", tmp_path)
    finish(start_train(run, script=DIE_IN_A_CHECKPOINT), code=-signal.SIGKILL)
    torn = list(tmp_path.glob(".checkpoint.*"))
    assert len(torn) == 1 and torn[0].stat().st_size > 1000
    with pytest.raises(RuntimeError):
        torch.load(torn[0], weights_only=True)
    assert saved_step(tmp_path) == 20 and logged_steps(tmp_path)[-1] == 39
    # The CSV's last line is torn as well.
    with open(tmp_path / "log.csv", "a") as file:
        file.write("42,4032,22.4,1.3")
    run_train(run, resume=True)
    assert_same_run(tmp_path, uninterrupted("paper"))
