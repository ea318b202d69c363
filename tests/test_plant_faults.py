"""The list of planted faults: every one can be planted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import plant_faults  # noqa: E402

FAULTS = plant_faults.load_faults(plant_faults.FAULTS)


def test_every_fault_can_be_planted(capsys):
    assert plant_faults.main(["--check"]) == 0, capsys.readouterr().out
    assert len(FAULTS) >= 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "diffupose/nothing.py"}, "there is no diffupose/nothing.py"),
        ({"find": "no such code"}, "holds 'no such code' 0 times"),
        ({"find": "return"}, "holds 'return' "),
        ({"tests": ("tests/test_schedule.py::test_nothing",)}, "there is no tests/test_schedule.py::test_nothing"),
        ({"commands": ("tools/nothing.py",)}, "there is no tools/nothing.py"),
    ],
)
def test_code_that_moved_is_said(change, message):
    fault = next(fault for fault in FAULTS if fault.file == "diffupose/schedule.py")
    assert message in replace(fault, **change).problem(ROOT)
