"""The contract of ``[tool.importlinter]``: imports point down, without circles."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path):
    """Return a folder with the package as an installation has it: ``kernels/`` stands inside."""
    for source, target in (("diffupose", "diffupose"), ("kernels", "diffupose/kernels")):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "models", "data", "examples")
        shutil.copytree(ROOT / source, tmp_path / target, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    """Return the exit status of ``lint-imports`` in a folder and what it prints."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    result = subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=100)
    return result.returncode, result.stdout + result.stderr


def test_imports_point_down(installed):
    code, text = lint(installed)
    assert code == 0, text
    assert "2 kept, 0 broken" in text


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("schedule", "from diffupose.lifting import inputs", "diffupose.schedule -> diffupose.lifting.inputs"),
        ("schedule", "import diffupose", "diffupose.schedule -> diffupose (l."),  # the package imports the Lifter
        ("ops/reverse_step", "from diffupose.engines import sample", "diffupose.ops.reverse_step -> diffupose.engines"),
        ("kernels/philox", "from diffupose.ops import reverse_step", "diffupose.kernels.philox -> diffupose.ops"),
        ("keypoints/types", "from diffupose.datasets import mocap", "diffupose.keypoints.types -> diffupose.datasets"),
        ("camera", "from diffupose import skeleton", "diffupose.camera -> diffupose.skeleton"),
    ],
)
def test_an_upward_import_is_found_inside_a_function(installed, module, line, expected):
    path = installed / "diffupose" / f"{module}.py"
    path.write_text(f"{path.read_text()}\n\ndef planted():\n    {line}\n")
    code, text = lint(installed)
    assert code == 1 and expected in text, text


def test_a_circle_inside_a_package_is_found(installed):
    path = installed / "diffupose" / "metrics" / "_checks.py"
    path.write_text(f"{path.read_text()}\n\ndef planted():\n    from diffupose.metrics import calibration\n")
    code, text = lint(installed)
    assert code == 1 and "No two modules of a package import each other BROKEN" in text, text


def test_no_circle_through_a_package():
    """What the contract does not see: a module that imports a name from its own package."""
    graph = grimp.build_graph("diffupose", cache_dir=None)
    for engine in ("cpp_engine", "sample"):
        graph.remove_import(importer="diffupose.ops", imported=f"diffupose.engines.{engine}")
    imports = networkx.DiGraph((a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a))
    assert list(networkx.simple_cycles(imports)) == []


def test_a_new_module_needs_a_place(installed):
    (installed / "diffupose" / "planted.py").touch()
    code, text = lint(installed)
    assert code == 1 and "diffupose.planted" in text, text
