"""The command as people run it, as a process; and the commands beside ``lift``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.cli_files import SIZE, coco, good, lift, write
from support.tiny_lifters import people, write_tiny_lifter

import diffupose
from diffupose.cli import main


def command(*arguments, stdout=subprocess.PIPE, **variables):
    root = Path(diffupose.__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)} | variables
    return subprocess.run(
        [sys.executable, "-m", "diffupose.cli", *map(str, arguments)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip


def test_as_a_process(model):
    done = command("lift", good(), "--model", model, *SIZE, "--out", "poses.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "poses:      poses.npz" in done.stdout
    assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)
    again = lift("kps.json", *SIZE, model=model, out="again.npz")
    assert np.abs(again["hypotheses"] - np.load("poses.npz")["hypotheses"]).max() < 1e-5


def test_poses_are_written_when_nobody_reads_the_messages(model):
    """`| head -1`, and a full disk behind `>`."""
    arguments = ("lift", good(), "--model", model, *SIZE, "--out", "poses.npz")
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)
    os.remove("poses.npz")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = command(*arguments, stdout=full)
        warning = "diffupose: warning: standard output failed: No space left on device\n"
        assert (done.returncode, done.stderr) == (0, warning)
        assert np.load("poses.npz")["hypotheses"].shape == (1, 5, 17, 3)


def test_names_that_the_terminal_cannot_show(model):
    name = write(coco((1, 0, 0.9)), "käptn.json")
    done = command("lift", name, "--model", model, *SIZE, "--out", "pøses.npz", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "poses:      p\\xf8ses.npz" in done.stdout
    assert np.load("pøses.npz")["hypotheses"].shape == (1, 5, 17, 3)


def test_an_error_as_a_process(model):
    done = command("lift", write("[{"), "--model", model, *SIZE, "--out", "poses.npz")
    assert done.returncode == 2
    assert done.stderr.startswith("diffupose: error: kps.json: broken JSON") and done.stderr.count("\n") == 1
    assert os.listdir() == ["kps.json"]


def test_a_request_to_end_leaves_nothing_half_written(tmp_path, monkeypatch):
    """SIGTERM while a picture is drawn: neither file appears, nor a temporary one."""
    from diffupose.commands import lift

    def terminated(path, *_):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(lift, "_plot", terminated)
    monkeypatch.chdir(tmp_path)
    np.save("kps.npy", people(1))
    write_tiny_lifter("tiny.safetensors")
    arguments = ["lift", "kps.npy", "--model", "tiny.safetensors", *SIZE, "--out", "poses.npz", "--plot", "poses.png"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 128 + signal.SIGTERM
    assert sorted(os.listdir()) == ["kps.npy", "tiny.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("DIFFUPOSE_BACKEND", "torch")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    variables = next(line for line in printed.splitlines() if line.startswith("variables"))
    assert "DIFFUPOSE_BACKEND=torch" in variables.split()
    for name in ("diffupose", "python", "torch", "numpy", "safetensors"):
        assert any(line.split()[0] == name for line in printed.splitlines())
    states = [line.split(maxsplit=2) for line in printed.splitlines() if line.startswith("backend ")]
    assert {state[1] for state in states} == {"torch", "cpp", "cuda", "triton"}
    for _, name, state in states:
        assert state.startswith(("active: ", "inactive: ")), name
        assert len(state.split(": ", 1)[1]) > 5  # the reason


@pytest.mark.parametrize("arguments", [[], ["dance"], ["lift"], ["evaluate"]])
def test_incomplete_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-hypotheses", "0"], "--num-hypotheses must be at least 1, got 0"),
        (["--num-inference-steps", "100000"], "--num-inference-steps must be an integer"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--data", "plain.npy"], "plain.npy must be an npz of motion capture"),
        (["--data", "text.npz"], "text.npz"),
        (["--data", "other.npz"], "other.npz must hold 'positions'"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--data", "text.npz", "--json", "./text.npz"], "--json must not be --data, got './text.npz'"),
        (["--reference", "text.npz", "--json", "text.npz"], "--json must not be --reference"),
        (["--regressor", "text.npz", "--json", "text.npz"], "--json must not be --regressor"),
        (["--json", "nowhere/scores.json"], "--json: the folder 'nowhere' does not exist"),
        (["--device", "abacus"], "--device must be"),
        (["--seed", str(2**64)], "--seed must be between 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses(model, capsys, options, expected):
    np.save("plain.npy", np.zeros((3, 17, 3)))
    np.savez("other.npz", a=np.zeros(3))
    Path("text.npz").write_text("hello")
    before = sorted(os.listdir())
    assert main(["evaluate", "mocap", "--model", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert sorted(os.listdir()) == before
