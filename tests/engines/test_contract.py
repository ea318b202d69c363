"""Engines are told apart by what they answer, not by their classes; each is what the contract asks for."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from support.random_denoisers import denoiser_config, random_denoiser

import diffupose
from diffupose.engines.choose import EngineChooser
from diffupose.engines.cpp_engine import PackedDenoiser
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.engine import Engine, ProgramEngine, SampleRequest
from diffupose.engines.module_engines import ModuleEngine, TritonEngine
from diffupose.engines.programs import layer_program
from diffupose.schedule import NoiseSchedule, step_table
from diffupose.testing import requires_cpp

PACKAGE = Path(diffupose.__file__).parent
ENGINES = [PackedDenoiser, CudaDenoiser, TritonEngine, ModuleEngine]
# What would tell engines apart, and what they are made of.
NAMES = {kind.__name__ for kind in [*ENGINES, Engine, ProgramEngine]} | {"FusedNetwork", "UnfitProgramError"}
NET = random_denoiser(denoiser_config("paper", hidden_dim=32, num_layers=1))


def questions(source: str) -> list[str]:
    """Return the calls in a file that ask for the class of an engine."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("isinstance", "issubclass")
        and any(isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in NAMES
                for node in ast.walk(call.args[1]))
    ]  # fmt: skip


def test_nobody_outside_asks_which_engine_it_is():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "engines"]
    assert len(files) > 50
    found = {str(path.relative_to(PACKAGE)): asked for path in files if (asked := questions(path.read_text()))}
    assert found == {}
    planted = "def f(engine):\n    return isinstance(engine, (int, ops.PackedDenoiser)) or isinstance(engine, int)"
    assert questions(planted) == ["isinstance(engine, (int, ops.PackedDenoiser))"]


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_has_the_contract(kind):
    assert issubclass(kind, Engine) and not inspect.isabstract(kind)
    assert kind.backend in ("cpp", "cuda", "torch", "triton")
    for name in ("denoise", "sample", "for_hypotheses", "check"):
        ours, asked = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (kind, Engine))
        assert ours == asked, name
    assert len({engine.backend for engine in ENGINES}) == len(ENGINES)


@requires_cpp
def test_engines_answer_alike():
    condition, table = torch.randn(2, 17, 2), step_table(NoiseSchedule(50), 3, sampler="ddim", prediction_type="sample")
    request = SampleRequest(condition, table, 5, torch.arange(2), torch.arange(3), 1.0)
    packed, plain = PackedDenoiser(layer_program(NET)), ModuleEngine(NET)
    assert torch.allclose(packed.sample(request), plain.sample(request), atol=1e-4)
    assert packed.sample(request).shape == request.shape
    inputs = torch.randn(2, 17, 3), condition, torch.tensor([7])
    assert torch.allclose(packed.denoise(*inputs), plain.denoise(*inputs), atol=1e-4)
    assert packed.name.startswith("cpp ") and (plain.name, plain.precision) == ("torch", "float32")
    assert packed.max_hypotheses == 4096 and plain.max_hypotheses is None


@requires_cpp
def test_an_engine_is_made_once(monkeypatch):
    """Until the weights change; the module itself needs no making."""
    chooser, device = EngineChooser(), torch.device("cpu")

    def choose(backend=None, precision="float32"):
        return chooser.engine_for(NET, 50, device, backend, precision)

    first = choose("cpp")
    assert choose("cpp") is first and first.for_hypotheses(1000) is first
    rough = choose("cpp", "bfloat16")
    assert rough.precision == "bfloat16" and choose("cpp") is first
    assert choose("torch").backend == "torch"
    with torch.no_grad():
        NET.gconv_output.bias.add_(0.0)
    assert choose("cpp") is not first
