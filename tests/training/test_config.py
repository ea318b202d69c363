"""Settings: defaults, preset, file, flags; and what the command line says when something is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch

from diffupose.cli import main
from diffupose.commands import train as command
from diffupose.errors import InputError
from diffupose.training import distributed
from diffupose.training import trainer as train_module
from diffupose.training.config import TrainConfig, learning_rate, make_train_config, model_config, read_config_file


class TestSettings:
    def test_paper(self):
        config = make_train_config({})
        assert (config.preset, config.loss, config.optimizer, config.lr) == ("paper", "l1", "adam", 4e-5)
        assert (config.lr_schedule, config.lr_decay, config.grad_clip) == ("exponential", 0.995, 0.0)
        assert (config.joint_weights, config.reconstruction_weight, config.mirror) == (True, 0.8, True)
        assert config.exclude_subjects == ("uiprmd_s10", "cmu_01")

    def test_preset_and_values(self):
        config = make_train_config({"preset": "parallel", "lr": 1, "exclude_subjects": ["a"]})
        assert (config.optimizer, config.loss, config.lr, config.exclude_subjects) == ("adamw", "mse", 1, ("a",))

    def test_model(self):
        config = make_train_config({"hidden_dim": 64, "num_layers": 2, "input_normalization": "person"})
        model = model_config(config)
        assert (model.denoiser.hidden_dim, model.denoiser.num_layers) == (64, 2)
        assert (model.input_normalization, model.name, model.diffusion.prediction_type) == (
            "person",
            "paper",
            "epsilon",
        )

    def test_model_settings(self):
        settings = ["denoiser.num_heads=2", "standardize_poses=false", "diffusion.prediction_type=v_prediction"]
        model = model_config(make_train_config({"preset": "parallel", "model": settings}))
        assert (model.denoiser.num_heads, model.standardize_poses) == (2, False)
        assert model.diffusion.prediction_type == "v_prediction"
        assert model.denoiser.hidden_dim == 96  # the rest is the preset's

    @pytest.mark.parametrize(
        "setting", ["num_heads=2", "denoiser.heads=2", "denoiser={}", "denoiser.num_heads", "sampler.eta=1", "=1"]
    )
    def test_model_settings_errors(self, setting):
        with pytest.raises(ValueError, match=r"model settings must look like denoiser\.num_heads=2"):
            model_config(make_train_config({"model": [setting]}))

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"learning_rate": 1.0}, "no training setting 'learning_rate'; there are .*lr, "),
            ({"steps": 1.5}, "steps must be int, got 1.5"),
            ({"steps": True}, "steps must be int, got True"),
            ({"lr": "fast"}, "lr must be float, got 'fast'"),
            ({"mirror": 1}, "mirror must be bool, got 1"),
            ({"exclude_subjects": "a"}, "exclude_subjects must be tuple.* got 'a'"),
            ({"steps": None}, "steps must be int, got None"),
            ({"preset": "best"}, "preset must be one of paper, parallel, base, got 'best'"),
            ({"loss": "l2"}, "loss must be one of l1, mse, got 'l2'"),
            ({"precision": "fp16"}, "precision must be one of float32, bfloat16, got 'fp16'"),
            ({"steps": 0}, "steps must be at least 1, got 0"),
            ({"lr": 0.0}, "lr must be positive, got 0"),
            ({"lr": float("nan")}, "lr must be positive, got nan"),
            ({"noise_scale": -1.0}, "noise_scale must be between 0 and 10, got -1"),
            ({"noise_scale": float("inf")}, "noise_scale must be between 0 and 10, got inf"),
            ({"missing_scale": 10.5}, "missing_scale must be between 0 and 10, got 10.5"),
            ({"exchange_limbs": 1.5}, r"exchange_limbs must be in \[0, 1\], got 1.5"),
            ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1"),
            ({"seed": 2**64}, "seed must"),
            ({"seed": -1}, "seed must"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_errors(self, values, match):
        with pytest.raises(ValueError, match=match):
            make_train_config(values)

    def test_schedules(self):
        # 10 samples in batches of 4: steps 0 to 2 begin in epoch 0, 3 and 4 in epoch 1, 5 in epoch 2.
        config = TrainConfig(batch_size=4, lr=1.0, lr_decay=0.5)
        assert [learning_rate(config, step, 10) for step in range(6)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
        config = TrainConfig(lr=2.0, lr_schedule="cosine", steps=4)
        expected = [2.0, 1.0 + np.sqrt(0.5), 1.0, 1.0 - np.sqrt(0.5)]
        assert [learning_rate(config, step, 10) for step in range(4)] == pytest.approx(expected)
        config = TrainConfig(lr=1.0, lr_schedule="constant", warmup_steps=4)
        assert [learning_rate(config, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


class TestFiles:
    def test_toml_and_json(self, tmp_path):
        values = {"preset": "parallel", "steps": 7, "lr": 0.5, "mirror": False, "exclude_subjects": ["a", "b"]}
        (tmp_path / "a.json").write_text(json.dumps(values))
        (tmp_path / "a.toml").write_text(
            'preset = "parallel"\nsteps = 7\nlr = 0.5\nmirror = false\nexclude_subjects = ["a", "b"]\n'
        )
        assert read_config_file(tmp_path / "a.json") == read_config_file(tmp_path / "a.toml") == values

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("a.json", "{", "a.json cannot be parsed"),
            ("a.json", "[1]", "must hold a table of settings, got list"),
            ("a.toml", "steps", "a.toml cannot be parsed"),
        ],
    )
    def test_errors(self, tmp_path, name, text, match):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=match):
            read_config_file(tmp_path / name)

    def test_flags_override_the_file_and_the_file_the_preset(self, tmp_path, monkeypatch):
        (tmp_path / "a.toml").write_text('preset = "parallel"\nsteps = 7\nlr = 0.5\n')
        seen = []
        monkeypatch.setattr(train_module, "train", lambda config, **options: seen.append((config, options)))
        flags = ["--config", str(tmp_path / "a.toml"), "--lr", "0.25", "--no-mirror", "--exclude-subjects", "a", "b"]
        assert main(["train", *flags, "--quiet"]) == 0
        [(config, options)] = seen
        assert (config.preset, config.steps, config.lr, config.mirror) == ("parallel", 7, 0.25, False)
        assert (config.batch_size, config.optimizer, config.exclude_subjects) == (128, "adamw", ("a", "b"))
        assert options == {"resume": False, "progress": False}

    def test_every_setting_has_a_flag(self):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        values = {
            "preset": "parallel", "data": "d", "keypoints": "k", "output": "o", "hidden_dim": 32, "num_layers": 1,
            "input_normalization": "image", "exclude_subjects": ["x"], "balance_subjects": True, "lr": 0.5,
            "warmup_steps": 3, "optimizer": "adam", "vary_bodies": False, "compile": True, "seed": 4,
        }  # fmt: skip
        flags = []
        for name, value in values.items():
            flag = name.replace("_", "-")
            flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}"]
            flags += [] if isinstance(value, bool) else [str(item) for item in np.atleast_1d(value)]
        parsed = vars(parser.parse_args(["train", *flags]))
        assert {name: parsed[name] for name in values} == values

    def test_every_setting_is_explained(self, capsys):
        texts = command.help_texts()
        assert texts.keys() == {item.name for item in dataclasses.fields(TrainConfig)} and all(texts.values())
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "--loss {l1,mse} l1 (paper) or mse." in shown and "Largest norm of the gradient; 0 for none." in shown


SMALL = ["--hidden-dim", "32", "--num-layers", "1", "--steps", "2", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def fails(capsys, tmp_path):
    """Run ``diffupose train`` and return the one line it fails with."""

    def run(*flags):
        assert main(["train", *SMALL, "--output", str(tmp_path / "run"), "--quiet", *map(str, flags)]) == 2
        output, errors = capsys.readouterr()
        assert not output and errors.count("\n") == 1 and errors.startswith("diffupose: error: ")
        return errors

    return run


class TestCommandLine:
    def test_no_data(self, fails, tmp_path):
        assert "data must name" in fails() and "--data FILE" in fails()
        assert not (tmp_path / "run").exists()

    def test_nothing_to_resume(self, capsys, tmp_path, mocap_path):
        folder = tmp_path / "run"
        assert main(["train", *SMALL, "--data", str(mocap_path), "--output", str(folder), "--quiet", "--resume"]) == 0
        expected = f"diffupose: {folder} holds no run to resume: starting from step 0\n"
        assert capsys.readouterr().err == expected

    def test_missing_file(self, fails, tmp_path):
        assert "nothing.npz" in fails("--data", tmp_path / "nothing.npz")
        assert "nothing.toml" in fails("--config", tmp_path / "nothing.toml")

    @pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 torn"])
    def test_not_an_npz(self, fails, tmp_path, content):
        path = tmp_path / "a.npz"
        path.write_bytes(content)
        assert "must be an npz" in fails("--data", path)

    def test_an_npy(self, fails, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((5, 17, 3)))
        assert "must be an npz" in fails("--data", tmp_path / "a.npy")

    def test_another_npz(self, fails, tmp_path):
        np.savez(tmp_path / "a.npz", poses=np.zeros((5, 17, 3)))
        assert "must hold 'positions'" in fails("--data", tmp_path / "a.npz")

    def test_a_torn_npz(self, fails, tmp_path, mocap_path):
        np.savez_compressed(tmp_path / "a.npz", **np.load(mocap_path))
        content = bytearray((tmp_path / "a.npz").read_bytes())
        content[2000:6000] = bytes(4000)
        (tmp_path / "a.npz").write_bytes(content)
        assert "a.npz" in fails("--data", tmp_path / "a.npz")

    def test_clips_that_do_not_fit(self, fails, tmp_path, mocap_path):
        arrays = dict(np.load(mocap_path))
        np.savez(tmp_path / "a.npz", **{**arrays, "clip_index": arrays["clip_index"][:-1]})
        assert "clip_index" in fails("--data", tmp_path / "a.npz")

    def test_nobody_left(self, fails, mocap_path):
        everybody = ("walker_01", "walker_02", "uiprmd_s10")
        assert "no pose" in fails("--data", mocap_path, "--exclude-subjects", *everybody)

    def test_keypoints_without_h36m(self, fails, mocap_path):
        assert "keypoints go with" in fails("--data", mocap_path, "--keypoints", "a.npz")

    def test_batch_size_and_processes(self, mocap_path):
        config = make_train_config({"batch_size": 9, "data": str(mocap_path)})
        with pytest.raises(ValueError, match="batch_size must be a multiple of 2 processes, got 9"):
            train_module._Trainer(config, 0, 2, False)

    def test_device(self, fails, mocap_path):
        for device in ("abacus", "meta"):
            assert "device must be" in fails("--data", mocap_path, "--device", device)
        if not torch.cuda.is_available():
            assert "without a GPU" in fails("--data", mocap_path, "--device", "cuda")

    def test_settings(self, fails, tmp_path):
        assert "num_heads" in fails("--preset", "parallel", "--hidden-dim", "33")
        assert "steps must be at least 1" in fails("--steps", "0")
        (tmp_path / "a.json").write_text('{"step": 3}')
        assert "'step'" in fails("--config", tmp_path / "a.json")

    def test_nobody_to_validate_on(self, fails, mocap_path):
        flags = ("--data", mocap_path, "--validate-every", "1", "--exclude-subjects")
        assert "exclude_subjects is empty" in fails(*flags)
        assert "'nobody' is not in" in fails(*flags, "nobody")

    def test_runs_and_resumes(self, fails, tmp_path, mocap_path):
        data = ["--data", str(mocap_path)]
        run = ["train", *SMALL, *data, "--output", str(tmp_path / "run"), "--quiet"]
        assert main(run) == 0
        written = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        assert "already holds a run" in fails(*data)
        for name, before, now in (
            ("lr", "4e-05", "0.001"), ("batch_size", "8", "16"), ("seed", "0", "3"), ("hidden_dim", "32", "48"),
            ("steps", "2", "4"), ("loss", "'l1'", "'mse'"),
        ):  # fmt: skip
            flag, new = f"--{name.replace('_', '-')}", now.strip("'")
            assert f"{flag} was {before} in the run to resume, got {now}" in fails(*data, "--resume", flag, new)
        np.savez(tmp_path / "fewer.npz", **{
            key: value[:100] if len(value) > 100 else value for key, value in np.load(mocap_path).items()
        })  # fmt: skip
        assert "180 training poses, data has 100" in fails("--data", tmp_path / "fewer.npz", "--resume")
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == written
        # What does not change the weights may change.
        assert main([*run, "--resume", "--log-every", "7"]) == 0

    @pytest.mark.parametrize("content", [b"", b"torn", "half"])
    def test_damaged_checkpoint(self, fails, tmp_path, mocap_path, content):
        data = ["--data", str(mocap_path)]
        assert main(["train", *SMALL, *data, "--output", str(tmp_path / "run"), "--quiet"]) == 0
        path = tmp_path / "run" / "checkpoint.pt"
        whole = path.read_bytes()
        cuts = [
            whole[: int(share * len(whole))] for share in (0.1, 0.4, 0.5, 0.7, 0.9)
        ]  # some are errors of the system
        for damaged in cuts if content == "half" else [content]:
            path.write_bytes(damaged)
            assert f"{path} cannot be read as a training checkpoint: it is damaged" in fails(*data, "--resume")

    def test_not_a_checkpoint(self, fails, tmp_path, mocap_path):
        (tmp_path / "run").mkdir()
        torch.save({"weights": torch.zeros(3)}, tmp_path / "run" / "checkpoint.pt")
        assert "not a training checkpoint" in fails("--data", mocap_path, "--resume")


class TestProcesses:
    """Which processes talk by what; the talking itself is tested in ``test_distributed.py``."""

    @pytest.fixture
    def started(self, monkeypatch):
        calls = []
        monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: calls.append(backend))
        monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
        monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(index))
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        return calls

    @pytest.mark.parametrize(
        ("device", "has_gpu", "calls"),
        [
            ("cpu", True, ["gloo"]), ("cpu", False, ["gloo"]), ("auto", False, ["gloo"]),
            ("auto", True, [1, "nccl"]), ("cuda", True, [1, "nccl"]),
        ],
    )  # fmt: skip
    def test_backend(self, started, monkeypatch, device, has_gpu, calls):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        assert distributed.start_processes(device) == (1, 2)
        assert started == calls

    def test_alone(self, started, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert distributed.start_processes("cpu") == (0, 1)
        monkeypatch.delenv("RANK")
        assert distributed.start_processes("cpu") == (0, 1)
        assert started == []
