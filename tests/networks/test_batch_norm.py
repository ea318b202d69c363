"""BatchNorm over joints and poses, alone and shared by two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import shared_batch_norm
from torch import multiprocessing, nn

from diffupose.networks.batch_norm import JointBatchNorm


def test_known_values():
    x = torch.randn(5, 17, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, -3.0, 8.0])
    layer = JointBatchNorm(3)
    values = x.double().numpy().reshape(-1, 3)
    expected = (values - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + 1e-5)
    np.testing.assert_allclose(layer(x).detach().numpy().reshape(-1, 3), expected, atol=1e-4)
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.1 * values.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), 0.9 + 0.1 * values.var(axis=0, ddof=1), rtol=1e-4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return inputs and gradients of a whole batch, and what two processes made of their halves."""
    folder = tmp_path_factory.mktemp("batch_norm")
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 2, 8, 17, 5, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.5, 3.0, 5, dtype=torch.float64) + 100.0
    x[:, 4:] += 7.0  # the halves are unlike
    torch.save({"x": x, "grad": grad}, folder / "inputs.pt")
    multiprocessing.spawn(shared_batch_norm.run, args=(2, str(folder)), nprocs=2)
    return x, grad, [torch.load(folder / f"result_{rank}.pt") for rank in range(2)]


def test_two_processes(shared):
    x, grad, results = shared
    # PyTorch's own layers on the whole batch.
    ours = shared_batch_norm.make_network(5)
    layers = [nn.BatchNorm1d(5, dtype=torch.float64) for _ in range(2)]
    for layer, index in zip(layers, (0, 2), strict=True):
        layer.load_state_dict(ours[index].state_dict())
    network = nn.Sequential(layers[0], nn.Tanh(), layers[1]).train()
    close = {"rtol": 1e-10, "atol": 1e-10}
    for step in range(2):
        network.zero_grad()
        whole = x[step].clone().requires_grad_()
        output = network(whole.flatten(0, 1)).view_as(whole)
        loss = (output * grad[step]).mean()
        loss.backward()
        halves = torch.cat([result["outputs"][step] for result in results])
        torch.testing.assert_close(halves, output.detach(), **close)
        # Each process's loss is the mean over its half: twice the gradient of the mean over the whole.
        gradients = torch.cat([result["grad_x"][step] for result in results])
        torch.testing.assert_close(gradients, 2.0 * whole.grad, **close)
    for result in results:
        torch.testing.assert_close(result["loss"], loss.detach(), **close)
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(result["grad_weights"][name], parameter.grad, **close)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, **close)
    network.eval()
    whole = network(x[0].flatten(0, 1)).view_as(x[0])
    torch.testing.assert_close(torch.cat([result["eval"] for result in results]), whole.detach(), **close)


def test_processes_end_alike(shared):
    _, _, (one, other) = shared
    for name in ("grad_weights", "buffers"):
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key])
