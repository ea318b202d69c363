"""Every kind of layer is handled wherever layers are, and CONTRIBUTING names these files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import pytest
from support import plain_program

from benchmarks.workloads import flops
from diffupose.engines import cpp_engine, cuda_plan, triton_network
from diffupose.engines.layer_program import Layer

ROOT = Path(__file__).parents[2]
KINDS = get_args(Layer)


# Where each engine, and what is compared with them, finds out how a kind of layer runs.
TABLES = {
    "diffupose/engines/cpp_engine.py": cpp_engine._ADD,
    "diffupose/engines/cuda_plan.py": cuda_plan._LOWER,
    "diffupose/engines/triton_network.py": triton_network._STEPS,
    "tests/support/plain_program.py": plain_program.FORMULAS,
    "benchmarks/workloads/flops.py": flops._FLOPS,
}
# Other files, several where one of them is enough, and what they say of a kind: {Kind} and {kind} are its name,
# {record} that of its CUDA records.
TEXTS = {
    "diffupose/engines/layer_program.py": [r"Layer = .*\b{Kind}\b", r"class {Kind}:"],
    "diffupose/engines/programs.py": [r"\b{Kind}\("],
    "csrc/bind/engine.cpp": [r'"add_{kind}"'],
    "csrc/engine/cpu/engine.h": [r"struct {Kind}Layer"],
    "csrc/engine/cpu/engine.cpp": [r"add\(const {Kind}Layer&", r"<{Kind}Args>"],
    "csrc/engine/cpu/kernels.h": [r"struct {Kind}Args"],
    "csrc/engine/cpu/kernels_isa.cpp": [r"const {Kind}Args&"],
    "csrc/bind/engine_cuda.cpp": [r'"{record}"'],
    "csrc/engine/cuda/engine_cuda.h": [r"enum class LayerKind[^}}]*\b{record}\b"],
    "csrc/engine/cuda/layers/layers.cu": [r"LayerKind::{record}\b"],
    "csrc/engine/cuda/persistent/persistent_mma.cu": [r"LayerKind::{record}\b"],
    "csrc/engine/cuda/persistent/persistent_wgmma.cu csrc/engine/cuda/persistent/wgmma_others.cuh": [
        r"LayerKind::{record}\b"
    ],
    "csrc/engine/cuda/cluster/cluster.cu csrc/engine/cuda/cluster/cluster_others.cuh": [r"(LayerKind::|// ){record}\b"],
}


EMPTY = []  # files that a test takes for empty


def read(path):
    return "" if path in EMPTY else (ROOT / path).read_text()


def missing(kind):
    """Return where a kind of layer is not handled."""
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    names = {"Kind": kind.__name__, "kind": snake, "record": snake + "(_weights|_apply)?"}  # attention has two
    found = [path for path, table in TABLES.items() if kind not in table]
    for paths, patterns in TEXTS.items():
        text = "".join(map(read, paths.split()))
        if not all(re.search(pattern.format(**names), text) for pattern in patterns):
            found.append(paths)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_handled_everywhere(kind):
    assert missing(kind) == []


@pytest.mark.parametrize("name", ["PlantedLayer", "Scale"])  # one begins as a kind that there is
def test_a_kind_that_is_nowhere_is_found_everywhere(name):
    assert missing(type(name, (), {})) == [*TABLES, *TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_one_file_forgets_is_found_there(kind, monkeypatch):
    for path, table in TABLES.items():
        with monkeypatch.context() as patch:
            patch.delitem(table, kind)
            assert missing(kind) == [path]
    for paths in TEXTS:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "EMPTY", paths.split())
            assert missing(kind) == [paths]


def test_the_checklist_names_every_file():
    text = read("CONTRIBUTING.md")
    section = text.split("## Add a layer kind\n")[1].split("\n## ")[0]
    files = " ".join([*TABLES, *TEXTS]).split()
    assert [path for path in files if f"`{path}`" not in section] == []
