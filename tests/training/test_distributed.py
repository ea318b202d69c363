"""Two processes with half of each batch do what one does with the whole."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.sweeps import mostly_slow
from support.training_runs import environment, finish, read_board, read_checkpoint, read_log, start_train, to_flags

STEPS = 50


def start_two(settings: dict[str, object], *more: str) -> subprocess.Popen:
    """Start ``torchrun --nproc-per-node=2 -m diffupose.train`` on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "diffupose.train", *to_flags(settings), *more]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("preset", mostly_slow(["paper", "parallel"]))
def test_two_processes(mocap_path, tmp_path, preset):
    settings = {
        "preset": preset, "data": mocap_path, "hidden_dim": 32, "num_layers": 1, "device": "cpu", "steps": STEPS,
        "batch_size": 64, "log_every": 1, "checkpoint_every": STEPS, "validate_every": STEPS, "ema_every": 1,
        "ema_start": 5, "exclude_subjects": ["uiprmd_s10"],
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start_train({**settings, "output": one}))
    output = finish(start_two({**settings, "output": two}))
    assert output.count("lifter: ") == 1  # rank 0 alone speaks

    rows, others = read_log(one), read_log(two)
    assert [int(row["step"]) for row in others] == list(range(1, STEPS + 1))  # and alone writes
    assert len(read_board(two)) == STEPS
    losses = [np.array([float(row["loss"]) for row in log]) for log in (rows, others)]
    assert len(set(losses[0])) == STEPS
    worst = np.abs(losses[1] / losses[0] - 1.0).max()
    print(f"{preset}: worst relative difference of the loss {worst:.1e}")
    assert worst < 1e-5
    norms = [np.array([float(row["gradient_norm"]) for row in log]) for log in (rows, others)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
    for name in ("samples", "epoch", "lr"):
        assert [row[name] for row in rows] == [row[name] for row in others]
    for name in ("val_h36m_mm", "val_wild_mm"):
        assert float(others[-1][name]) == pytest.approx(float(rows[-1][name]), rel=1e-2)

    states = read_checkpoint(one), read_checkpoint(two)
    for name in ("pose_mean", "pose_scale", "rng"):
        assert torch.equal(states[0][name], states[1][name])
    assert states[0]["sampler"] == states[1]["sampler"]
    for part in ("denoiser", "ema"):
        for name, value in states[0][part].items():
            # Gradients of a bias before BatchNorm are rounding noise, which Adam makes full steps of.
            if not name.endswith("gconv.bias"):
                assert relative(states[1][part][name], value) < 1e-2, (part, name)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


def test_errors(mocap_path, tmp_path):
    settings = {"data": mocap_path, "output": tmp_path, "batch_size": 9, "device": "cpu", "hidden_dim": 32}
    process = start_two(settings)
    message = finish(process, code=1)  # the launcher's status; that of the processes stands in its report
    assert "--batch-size must be a multiple of 2 processes, got 9" in message
    assert "exitcode  : 2" in message
    assert not (tmp_path / "log.csv").exists()
