"""Tests of what `diffupose env` shows."""

from __future__ import annotations

import json

import torch

import diffupose
from diffupose.env import environment, format_environment
from diffupose.ops import available_backends


def test_environment_is_plain_data():
    env = json.loads(json.dumps(environment()))
    assert env["versions"]["diffupose"] == diffupose.__version__
    assert env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert set(env["backends"]) == {"torch", "cpp", "cuda", "triton"}
    for name, (active, reason) in available_backends().items():
        assert env["backends"][name] == {"active": active, "reason": reason}
        assert reason


def test_format_names_every_backend_and_why():
    lines = format_environment().splitlines()
    for name, (active, reason) in available_backends().items():
        line = next(line for line in lines if line.startswith(f"backend {name} "))
        assert line.endswith(f"{'active' if active else 'inactive'}: {reason}")
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
