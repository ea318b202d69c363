"""The average of the weights against its recurrence in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffupose.training.config import TrainConfig
from diffupose.training.ema import ExponentialMovingAverage


def make_network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def change(network):
    """Move weights and BatchNorm statistics."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(value + 1 if not value.is_floating_point() else torch.randn_like(value))


@pytest.mark.parametrize(
    ("every", "start", "power", "limit"), [(10, 100, 2 / 3, 0.995), (1, 3, 0.75, 0.9995), (2, 0, 0.5, 0.6)]
)
def test_recurrence(every, start, power, limit):
    network = make_network()
    ema = ExponentialMovingAverage(
        network, TrainConfig(ema_every=every, ema_start=start, ema_power=power, ema_decay=limit)
    )
    expected = {name: value.double().numpy().copy() for name, value in network.state_dict().items()}
    for step in range(1, 161):
        change(network)
        ema.update(network, step)
        if step % every == 0:
            decay = 0.0 if step <= start else min(limit, 1.0 - (1.0 + step - start) ** -power)
            for name, value in network.state_dict().items():
                kept = decay if value.is_floating_point() else 0.0
                expected[name] = kept * expected[name] + (1.0 - kept) * value.double().numpy()
    for name, value in ema.model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_copies_until_start():
    network = make_network()
    ema = ExponentialMovingAverage(network, TrainConfig(ema_every=1, ema_start=5))
    for step in range(1, 6):
        change(network)
        ema.update(network, step)
        for name, value in ema.model.state_dict().items():
            assert torch.equal(value, network.state_dict()[name])
    change(network)
    ema.update(network, 6)
    assert not torch.equal(ema.model[0].weight, network[0].weight)


def test_does_not_learn():
    ema = ExponentialMovingAverage(make_network().train(), TrainConfig())
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
