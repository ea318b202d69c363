"""One of several processes that share a batch: run by ``torch.multiprocessing``, which imports it by name."""

from __future__ import annotations

import torch
from torch import distributed as dist

from diffupose.networks.batch_norm import JointBatchNorm
from diffupose.training.distributed import average, average_gradients


def make_network(channels: int) -> torch.nn.Module:
    """Return two normalisations with a nonlinearity between them, float64, with weights of their own."""
    generator = torch.Generator().manual_seed(0)
    layers = [JointBatchNorm(channels, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randn(channels, generator=generator, dtype=torch.float64)
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])


def run(rank: int, count: int, folder: str) -> None:
    """Take two steps on this process's share of ``inputs.pt`` and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    data = torch.load(f"{folder}/inputs.pt")
    x, grad = (data[name].chunk(count, dim=1)[rank] for name in ("x", "grad"))
    network = make_network(x.shape[-1]).train()
    outputs, gradients = [], []
    for step in range(len(x)):
        network.zero_grad()
        share = x[step].clone().requires_grad_()
        output = network(share)
        loss = (output * grad[step]).mean()
        loss.backward()
        average_gradients(network, count)
        outputs.append(output.detach())
        gradients.append(share.grad)
    result = {
        "outputs": torch.stack(outputs),
        "grad_x": torch.stack(gradients),
        "grad_weights": {name: parameter.grad for name, parameter in network.named_parameters()},
        "loss": average(loss.detach(), count),
        "buffers": dict(network.named_buffers()),
        "eval": network.eval()(x[0]).detach(),
    }
    torch.save(result, f"{folder}/result_{rank}.pt")
    dist.destroy_process_group()
