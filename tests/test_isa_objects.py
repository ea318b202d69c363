"""Files that are compiled for newer processors must leave nothing behind that the rest of the library could use.

The linker keeps one copy of an inline function or a template for the whole library. If it were the copy of such a file,
an older processor would meet an instruction that it does not know.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Those of the extension: what the emulation of CUDA compares with is compiled once, named after the whole file.
OBJECTS = sorted(path for path in (ROOT / "build").glob("*/**/*_isa.*.o") if not path.name.endswith(".cpp.o"))
SOURCES = sorted((ROOT / "csrc").rglob("*_isa.cpp"))

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")


def definitions(path: Path) -> list[tuple[str, str]]:
    """Return the kind and the name of every symbol that an object file defines."""
    text = subprocess.run(["nm", "--defined-only", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    return [(kind, name) for _, kind, name in (line.split(" ", 2) for line in text.splitlines())]


def assert_defines_nothing_of_others(path: Path, isa: str) -> None:
    found = definitions(path)
    assert any(re.fullmatch(rf"diffupose::{isa}::k[A-Z]\w*", name) for _, name in found)
    inside = re.compile(rf"\b(diffupose::)?{isa}::")
    for kind, name in found:
        # Upper case is visible to the linker: weak (V, W, u), text (T), data (B, D, R).
        assert kind not in "VWvwu", f"{path.name} has the weak symbol {name}"
        assert kind.islower() or inside.search(name), f"{path.name} defines {name}"
        # Code that runs when the library is loaded, on every processor.
        assert "_GLOBAL__" not in name and "static_initialization" not in name, f"{path.name} has a constructor, {name}"


@pytest.mark.skipif(not OBJECTS, reason="no build folder")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_objects_of_the_build(path):
    assert_defines_nothing_of_others(path, path.name.split(".")[-2])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_function_depends_on_being_inlined(source, tmp_path):
    """Without optimisation every inline function that is used comes out of line, where an optimiser might hide it."""
    target = tmp_path / "object.o"
    command = f"c++ -std=c++17 -O0 -DDIFFUPOSE_ISA=portable -I {shlex.quote(str(ROOT / 'csrc'))}"
    subprocess.run([*shlex.split(command), "-c", str(source), "-o", str(target)], check=True)
    assert_defines_nothing_of_others(target, "portable")
