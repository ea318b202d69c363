"""Importing is cheap and has no side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffupose

CODE = """
import json, os, signal, sys, time, warnings
import numpy, torch
warnings.simplefilter("error")
def state():
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "seed": torch.random.get_rng_state().sum().item(),
        "numpy": numpy.geterr(),
        "environment": sorted(os.environ.items()),
        "folder": os.getcwd(),
        "path": sys.path,
        "interrupt": str(signal.getsignal(signal.SIGINT)),
    }
before, start = state(), time.process_time()
from diffupose import Lifter
seconds = time.process_time() - start
public = sys.modules["diffupose"].__all__
print(json.dumps({"same": before == state(), "seconds": seconds, "all": sorted(sys.modules), "public": public}))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    root = Path(diffupose.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


def test_nothing_global_changes(imported):
    assert imported["same"]


@pytest.mark.parametrize(
    "name",
    ["matplotlib", "triton", "tensorboard", "scipy", "diffusers", "pandas", "torchvision", "diffupose.training.trainer",
     "diffupose.lifting.plot", "diffupose.evaluation.mocap"],
)  # fmt: skip
def test_what_is_not_needed_is_not_imported(imported, name):
    assert name not in imported["all"]
    assert "diffupose.lifting.lifter" in imported["all"]


def test_public_names(imported):
    assert imported["public"] == ["LiftResult", "Lifter", "__version__"]
    assert all(hasattr(diffupose, name) for name in diffupose.__all__)


def test_it_takes_little_time_beside_torch(imported):
    # All of `from diffupose import Lifter` shall stay under 3 s; torch alone takes 1 to 2, the rest is ours.
    assert imported["seconds"] < 1.0
