"""Where batches are drawn and how gradients are asked for changes nothing about a run."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffupose.training.batches import TrainBatch
from diffupose.training.config import make_train_config
from diffupose.training.gradients import Gradients
from diffupose.training.loader import load_batches
from diffupose.training.trainer import train

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture
def weights(mocap_path, tmp_path):
    """Train a little and return the weights."""

    def run(name, **settings):
        values = {
            "data": str(mocap_path), "output": str(tmp_path / name), "exclude_subjects": ["uiprmd_s10"],
            "preset": "parallel", "hidden_dim": 32, "num_layers": 1, "steps": 12, "batch_size": 96, "lr": 1e-3,
        }  # fmt: skip
        return load_file(train(make_train_config({**values, **settings}), progress=False))

    return run


@pytest.mark.parametrize("preset", ["parallel", "paper"])
def test_workers_draw_the_same_batches(weights, preset):
    here = weights("here", device="cpu", preset=preset)
    ahead = weights("ahead", device="cpu", preset=preset, workers=2)
    assert all(torch.equal(ahead[name], value) for name, value in here.items())


def test_batches_come_in_order():
    class Source:
        num_samples = 100

        def batch(self, step, batch_size=None):
            return TrainBatch(torch.full((2, 3), float(step)), torch.full((2, 3), -float(step)))

    for workers in (0, 3):
        got = list(load_batches(Source(), 5, 25, workers, torch.device("cpu")))
        assert [float(batch.condition[0, 0]) for batch in got] == list(range(5, 25))
        assert all(torch.equal(batch.condition, -batch.poses_3d) for batch in got)


def test_workers_must_not_be_negative():
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        make_train_config({"workers": -1})


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_every_call_gives_its_own_gradients(device):
    """Nothing is left of the call before: not in the gradients, not in the loss."""
    layer = torch.nn.Linear(4, 3).to(device)
    gradients = Gradients(lambda x, y: (layer(x) - y).square().mean(), layer.parameters(), as_graph=device == "cuda")
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        x, y = (torch.randn(5, size, generator=generator).to(device) for size in (4, 3))
        loss = gradients(x, y)
        with torch.no_grad():
            difference = layer(x) - y
        torch.testing.assert_close(loss, difference.square().mean())
        expected = 2 / difference.numel() * difference.T @ x
        torch.testing.assert_close(layer.weight.grad, expected)
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
            layer.weight.grad.mul_(3.0)  # as clipping does


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("preset", ["parallel", "paper"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graph_trains_the_same(weights, preset, precision):
    """A CUDA graph runs the same kernels; what differs is what their order of addition may change."""
    settings = {"device": "cuda", "preset": preset, "precision": precision, "lr": 1e-4}
    eager, graph = weights("eager", cuda_graph=False, **settings), weights("graph", **settings)
    again = weights("again", cuda_graph=False, **settings)
    start = weights("start", cuda_graph=False, **{**settings, "lr": 1e-12})
    for name, value in eager.items():
        if value.is_floating_point():
            moved = (value - start[name]).norm()
            noise = (value - again[name]).norm()
            assert (value - graph[name]).norm() <= 0.05 * moved + 2.0 * noise + 1e-6, name
