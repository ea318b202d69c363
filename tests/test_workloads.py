"""What benchmarks and GPU checks time: operations of a network, inputs that show errors, tables of the results."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.random_denoisers import denoiser_config

from diffupose.config import BASE
from diffupose.networks.build import build_denoiser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.workloads.networks")


@pytest.mark.parametrize("model", ["paper-64", "base-64"])
def test_networks_that_are_timed_show_errors(networks, model):
    """What they give depends on their inputs: else a wrong result would pass."""
    net = networks.network(model)
    condition = networks.conditions(model, 8, torch.device("cpu"))
    with torch.no_grad():
        out = net(torch.randn(8, 17, 3), condition, torch.tensor([50]))[..., :3]
    assert 0.05 < float(out.std(dim=0).mean()) < 1.0
    assert net.config.hidden_dim == 64


def test_conditions_of_a_frame_do_not_depend_on_the_others(networks):
    device = torch.device("cpu")
    few, many = (networks.conditions("paper-64", frames, device) for frames in (2, 1024))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize(("width", "mega"), [(384, 92.7), (256, 41.8)])
def test_operations_of_the_released_network(networks, width, mega):
    config = denoiser_config("paper", hidden_dim=width, num_layers=4)
    assert networks.denoiser_flops(build_denoiser(config).eval(), 17) / 1e6 == pytest.approx(mega, abs=0.05)


def test_operations_of_the_base_network_by_hand(networks):
    width, joints, channels = 128, 17, 3 + BASE.denoiser.num_condition_channels
    products = 2 * (2 * joints * width * width * 2)  # two graph convolutions, own and neighbours' weights
    adjacency = 2 * (2 * joints * joints * width)
    attention = 2 * joints * width * 3 * width + 2 * joints * width * width  # queries, keys, values; output
    scores = 2 * (2 * joints * joints * width)  # q k^T and the weighted sum, over all heads
    ends = 2 * joints * channels * width + 2 * joints * width * 3
    expected = 4 * (products + adjacency + attention + scores) + ends
    assert networks.denoiser_flops(build_denoiser(BASE.denoiser).eval(), joints) == expected
    assert (width, BASE.denoiser.num_layers, BASE.denoiser.num_heads) == (BASE.denoiser.hidden_dim, 4, 4)


@pytest.mark.parametrize("module", ["benchmarks.gpu.tables", "benchmarks.accuracy.ladder_report"])
def test_tables_of_the_documents_are_those_of_the_results(module):
    command = [sys.executable, "-m", module, "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr or f"run python -m {module}"


def test_a_table_that_differs_is_found_and_put_right(networks, tmp_path):
    rewrite = importlib.import_module("benchmarks.workloads.table").rewrite
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- one: made by x.py -->\n\n| 1 |\n\n<!-- end of one -->\nafter\n")
    assert rewrite(path, {"one": "| 1 |"}, "x.py", check=True)
    before = path.read_text()
    assert not rewrite(path, {"one": "| 2 |"}, "x.py", check=True)
    assert path.read_text() == before
    rewrite(path, {"one": "| 2 |"}, "x.py", check=False)
    assert path.read_text() == before.replace("| 1 |", "| 2 |")
