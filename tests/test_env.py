"""Tests of what `diffupose env` shows."""

from __future__ import annotations

import json

import torch

import diffupose
from diffupose.commands.env import environment, format_environment
from diffupose.ops import _backend, available_backends
from diffupose.testing import requires_cpp


def test_environment_is_plain_data():
    env = json.loads(json.dumps(environment()))
    assert env["versions"]["diffupose"] == diffupose.__version__
    assert env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert set(env["backends"]) == {"torch", "cpp", "cuda", "triton"}
    for name, (active, reason) in available_backends().items():
        assert env["backends"][name]["active"] == active
        assert reason and env["backends"][name]["reason"].startswith(reason)


def test_format_names_every_backend_and_why():
    lines = format_environment().splitlines()
    for name, state in environment()["backends"].items():
        line = next(line for line in lines if line.startswith(f"backend {name} "))
        assert line.endswith(f"{'active' if state['active'] else 'inactive'}: {state['reason']}")
    assert any(line.split() == ["torch", torch.__version__] for line in lines)


@requires_cpp
def test_the_engine_says_its_instruction_set(monkeypatch):
    usable = _backend.cpp().usable_isas()
    for isa in usable:
        monkeypatch.setenv("DIFFUPOSE_ISA", isa)
        reason = environment()["backends"]["cpp"]["reason"]
        assert reason.endswith(f", {isa} (runs here: {', '.join(usable)})")
    monkeypatch.setenv("DIFFUPOSE_ISA", "mmx")
    assert "the environment variable DIFFUPOSE_ISA must be one of" in environment()["backends"]["cpp"]["reason"]


def test_without_the_engine_there_is_no_instruction_set(monkeypatch):
    monkeypatch.setattr(_backend, "_CPP", None)
    monkeypatch.setattr(_backend, "_CPP_REASON", "it is raining")
    assert environment()["backends"]["cpp"] == {"active": False, "reason": "it is raining"}
