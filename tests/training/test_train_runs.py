"""Whole small runs: they learn, and leave what they should."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import read_board, read_checkpoint, read_log

from diffupose import Lifter
from diffupose.errors import InputError
from diffupose.training import loss as loss_module
from diffupose.training import trainer as train_module
from diffupose.training.config import make_train_config
from diffupose.training.trainer import train

SMALL = {
    "hidden_dim": 32, "num_layers": 1, "steps": 30, "batch_size": 128, "log_every": 1, "checkpoint_every": 10,
    "device": "cpu", "ema_every": 1, "ema_start": 5, "exclude_subjects": ["uiprmd_s10"],
}  # fmt: skip


@pytest.fixture
def start(mocap_path, tmp_path, monkeypatch):
    """Train in this process and return the folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(resume=False, **settings):
        values = {"data": str(mocap_path), "output": str(tmp_path / "run"), **SMALL, **settings}
        path = train(make_train_config(values), resume=resume, progress=False)
        assert path == Path(values["output"]) / "model.safetensors"
        return path.parent

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def stop_at(monkeypatch):
    """Let a run fail at a step."""

    def stop(step):
        counter = iter(range(step))

        def forward(self, *inputs):
            if next(counter, None) is None:
                raise OSError("no space left on device")
            return original(self, *inputs)

        original = loss_module.DiffusionLoss.forward
        monkeypatch.setattr(loss_module.DiffusionLoss, "forward", forward)
        return lambda: monkeypatch.setattr(loss_module.DiffusionLoss, "forward", original)

    return stop


@pytest.mark.parametrize("preset", ["paper", "parallel"])
def test_learns(start, preset):
    folder = start(preset=preset, lr=2e-3, lr_schedule="constant", warmup_steps=0)
    rows = read_log(folder)
    losses = np.array([float(row["loss"]) for row in rows])
    assert losses[-5:].mean() < 0.85 * losses[:3].mean()
    assert [float(row["epoch"]) for row in rows] == [pytest.approx(step * 128 / 180) for step in range(1, 31)]
    assert all(row["val_h36m_mm"] == row["val_wild_mm"] == "" for row in rows)

    lifter = Lifter.from_pretrained(folder / "model.safetensors", device="cpu")
    state = read_checkpoint(folder)
    for name, value in lifter.denoiser.state_dict().items():  # the averaged weights, not the last ones
        assert torch.equal(value, state["ema"][name])
    assert any(not torch.equal(state["ema"][name], value) for name, value in state["denoiser"].items())
    result = lifter(400.0 + 100.0 * torch.rand(2, 17, 2), image_size=(1000, 1000), num_hypotheses=3, seed=0)
    assert result.hypotheses.shape[0] == 2 and torch.isfinite(result.hypotheses).all()
    assert not result.hypotheses[..., 0, :].any()
    assert lifter.config.name == preset
    # Others may read it as they may read the rest of the folder.
    assert os.stat(folder / "model.safetensors").st_mode == os.stat(folder / "checkpoint.pt").st_mode


def test_initialize(start, tmp_path):
    """A run begins with another lifter's weights and statistics; at next to no learning rate it ends there, too."""
    first = start(preset="parallel", steps=10, lr=2e-3, output=str(tmp_path / "first")) / "model.safetensors"
    second = start(preset="parallel", steps=3, lr=1e-12, seed=7, initialize=str(first)) / "model.safetensors"
    before, after = load_file(first), load_file(second)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(InputError, match="initialize must be a lifter of the same model; its denoiser is ") as caught:
        start(preset="paper", output=str(tmp_path / "third"), initialize=str(first))
    message = str(caught.value)
    assert "architecture='parallel_gcn'" in message and "skeleton" not in message  # only what differs
    with pytest.raises(FileNotFoundError, match="nothing"):
        start(preset="parallel", output=str(tmp_path / "third"), initialize=str(tmp_path / "nothing"))


def test_bfloat16(start, tmp_path):
    """Products in bfloat16 give nearly the losses of float32, not the same ones; the weights stay float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        folder = start(preset="parallel", lr=2e-3, steps=10, precision=precision, output=str(tmp_path / precision))
        losses[precision] = np.array([float(row["loss"]) for row in read_log(folder)])
        assert {value.dtype for value in read_checkpoint(folder)["denoiser"].values()} == {torch.float32}
    assert 0 < np.abs(losses["bfloat16"] / losses["float32"] - 1).max() < 0.02


@pytest.mark.parametrize(("loss", "optimizer"), [("mse", "adamw"), ("l1", "adam")])
def test_steps_are_those_of_the_optimizer(start, monkeypatch, loss, optimizer):
    """One step in full: gradients of the loss, clipped, into PyTorch's optimiser at the scheduled rate."""
    seen = {}

    class Spy(train_module._Trainer):
        def _train_step(self, batch):
            before = {name: value.detach().clone() for name, value in self.denoiser.named_parameters()}
            result = super()._train_step(batch)
            seen.setdefault("first", (before, dict(self.denoiser.named_parameters()), self.state.optimizer, result))
            return result

    monkeypatch.setattr(train_module, "_Trainer", Spy)
    start(steps=1, loss=loss, optimizer=optimizer, weight_decay=0.5, grad_clip=0.01, lr=0.01, warmup_steps=4)
    before, after, used, (_, norm) = seen["first"]
    assert type(used) is {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer]
    assert norm > 0.01  # of the gradient as it was
    clipped = torch.cat([value.grad.flatten() for value in after.values()]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)
    for name, value in after.items():
        gradient, rate = value.grad.double(), 0.01 / 4
        expected = before[name].double()
        if optimizer == "adamw":
            expected = expected * (1.0 - rate * 0.5)
        else:
            gradient = gradient + 0.5 * expected
        expected = expected - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(value.detach().double(), expected, atol=2e-5, rtol=1e-4)


def test_epochs_change_the_learning_rate(start):
    rows = read_log(start(steps=5, lr=1e-4))
    epochs = [step * 128 // 180 for step in range(5)]
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-4 * 0.995**epoch for epoch in epochs])


def test_validation(start):
    # Validation comes when it is due, between logged steps, too.
    rows = read_log(start(steps=10, log_every=4, validate_every=3))
    assert [int(row["step"]) for row in rows] == [3, 4, 6, 8, 9, 10]
    for row in rows:
        due = int(row["step"]) in (3, 6, 9, 10)
        for name in ("val_h36m_mm", "val_wild_mm"):
            assert (row[name] != "") == due
            if due:
                assert 50.0 < float(row[name]) < 2000.0


def test_validation_does_not_change_the_weights(start, tmp_path):
    start(steps=4)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run").rename(tmp_path / "other")
    start(steps=4, validate_every=1)
    for name, value in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(value, weights[name])


def test_log_averages_steps(start, tmp_path):
    each = read_log(start(steps=7))
    (tmp_path / "run").rename(tmp_path / "other")
    rows = read_log(start(steps=7, log_every=3))
    assert [int(row["step"]) for row in rows] == [3, 6, 7]
    for name in ("loss", "gradient_norm"):
        values = [float(row[name]) for row in each]
        expected = [np.mean(values[:3]), np.mean(values[3:6]), values[6]]
        assert [float(row[name]) for row in rows] == pytest.approx(expected)


def test_resume_purges_tensorboard(start, stop_at, tmp_path):
    go_on = stop_at(27)
    with pytest.raises(OSError, match="no space"):
        start()
    go_on()
    folder = tmp_path / "run"
    assert [int(row["step"]) for row in read_log(folder)] == list(range(1, 28))
    assert read_checkpoint(folder)["step"] == 20
    start(resume=True)
    assert [step for step, _ in read_board(folder)] == list(range(1, 31))
    logged = [float(row["loss"]) for row in read_log(folder)]
    assert [value for _, value in read_board(folder)] == pytest.approx(logged)
    assert len(read_board(folder, "lr")) == len(read_board(folder, "gradient_norm")) == 30


@pytest.mark.parametrize("written", ["checkpoint.pt", "model.safetensors"])
def test_stopped_between_the_last_files(start, monkeypatch, tmp_path, written):
    folder, writes = tmp_path / "run", []

    def replace(source, target):
        original(source, target)
        writes.append(target.name)
        if writes.count(written) == 3 and target.name == written:  # steps 10, 20, 30
            raise OSError("no space left on device")

    original = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="no space"):
            start()
    start(resume=True)
    state, lifter = read_checkpoint(folder), load_file(folder / "model.safetensors")
    assert state["step"] == 30
    for name, value in state["ema"].items():
        assert torch.equal(lifter[f"denoiser.{name}"], value)


def test_checkpoint_contents(start):
    folder = start(steps=13, batch_size=100)
    state = read_checkpoint(folder)
    assert state["step"] == 13 and state["optimizer"]["state"][0]["step"] == 13
    assert state["sampler"] == {"seed": 0, "epoch": 7, "position": 1300 - 7 * 180, "num_samples": 180}
    assert json.loads(state["train_config"])["batch_size"] == 100
    assert state["rng"].dtype == torch.uint8
    assert set(state["denoiser"]) == set(state["ema"])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_not_finite(start, monkeypatch, tmp_path):
    """Neither a loss nor a gradient that is not finite reaches a checkpoint."""
    for what in ("loss", "gradient"):

        class Broken(loss_module.DiffusionLoss):
            calls = 0

            def forward(self, *inputs, what=what):
                type(self).calls += 1
                value = super().forward(*inputs)
                if type(self).calls < 10:
                    return value
                # The square root's slope at 0 is infinite.
                return value * float("nan") if what == "loss" else value + (0.0 * value).sqrt()

        monkeypatch.setattr(train_module, "DiffusionLoss", Broken)
        with pytest.raises(FloatingPointError, match=rf"the {what}.* is nan at step 9: try a smaller --lr"):
            start(output=str(tmp_path / what))
        assert not (tmp_path / what / "checkpoint.pt").exists()


def test_h36m(start, tmp_path):
    from support.training_runs import stick_figures

    kept = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
    generator = np.random.default_rng(0)
    poses, keypoints = {}, {}
    for subject in ("S1", "S5", "S6", "S7", "S8", "S9"):
        figures = np.zeros((8, 32, 3), dtype=np.float32)
        figures[:, kept] = stick_figures(8, generator)
        poses[subject] = {"Walking": figures}
        keypoints[subject] = {"Walking": [generator.uniform(0, 1000, (8, 17, 2)).astype("f4") for _ in range(4)]}
    np.savez(tmp_path / "data_3d_h36m.npz", positions_3d=poses)
    np.savez(tmp_path / "data_2d_h36m_cpn_ft_h36m_dbb.npz", positions_2d=keypoints)
    folder = start(
        data=str(tmp_path / "data_3d_h36m.npz"), keypoints=str(tmp_path / "data_2d_h36m_cpn_ft_h36m_dbb.npz"), steps=2
    )
    assert read_checkpoint(folder)["sampler"]["num_samples"] == 2 * 5 * 4 * 8
    assert len(read_log(folder)) == 2
