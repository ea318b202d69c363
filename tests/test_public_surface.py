"""Public names and parameters change on purpose only."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path

import pytest
from support.public_surface import public_surface

LIST = Path(__file__).parent / "public_surface.txt"


def test_public_surface():
    expected, found = LIST.read_text(), public_surface()
    difference = difflib.unified_diff(expected.splitlines(), found.splitlines(), "listed", "found", lineterm="", n=0)
    assert found == expected, (
        "the public surface changed:\n"
        + "\n".join(difference)
        + "\nIf that is wanted, add a line to CHANGELOG.md and run:\n"
        + "python tests/support/public_surface.py > tests/public_surface.txt"
    )


def test_module_train_takes_the_flags_of_the_command(monkeypatch, capsys):
    texts = []
    for module, arguments in (("diffupose", ["train", "--help"]), ("diffupose.train", ["--help"])):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(module, run_name="__main__")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "--ema-decay" in texts[0]
