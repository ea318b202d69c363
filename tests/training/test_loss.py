"""The objective against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffupose.config import PAPER, PARALLEL
from diffupose.schedule import PREDICTION_TYPES
from diffupose.skeleton import H36M_16, H36M_17
from diffupose.training.batches import TrainBatch
from diffupose.training.config import TrainConfig
from diffupose.training.loss import DiffusionLoss, joint_weights

WEIGHTS = {
    17: [1, 1, 2, 4, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 1, 2, 4],
    16: [1, 1, 2, 4, 1, 2, 4, 1, 1, 1, 1, 2, 4, 1, 2, 4],
}
SKELETONS = {17: H36M_17, 16: H36M_16}


class Fixed(nn.Module):
    """A network that answers the same whatever it sees, and remembers what it saw."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, sample, inputs, timesteps):
        self.seen = sample, inputs, timesteps
        return self.output


def make_model(preset=PAPER, num_joints=17, channels=2, prediction_type="epsilon"):
    return replace(
        preset,
        denoiser=replace(preset.denoiser, skeleton=SKELETONS[num_joints].name, condition_channels=channels),
        diffusion=replace(preset.diffusion, prediction_type=prediction_type),
    )


def make_inputs(model, num_joints=17, channels=2, outputs=5, batch=6):
    """Return a network, a batch, timesteps and noise."""
    output, inputs, noise, poses = (torch.randn(batch, num_joints, count) for count in (outputs, channels, 3, 3))
    timesteps = torch.randint(model.diffusion.num_train_timesteps, (batch,))
    return Fixed(output), TrainBatch(inputs, poses), timesteps, noise


def signal_of(model, timesteps):
    """Return sqrt(alpha-bar) and sqrt(1 - alpha-bar), ``[B, 1, 1]`` each, of the cosine schedule, by its formula."""
    steps = model.diffusion.num_train_timesteps
    curve = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1.0 - curve[1:] / curve[:-1], 0.999)
    cumprod = np.cumprod(1.0 - betas)[timesteps.numpy()][:, None, None]
    return np.sqrt(cumprod), np.sqrt(1.0 - cumprod)


@pytest.mark.parametrize("num_joints", [17, 16])
def test_joint_weights(num_joints):
    assert joint_weights(SKELETONS[num_joints]).tolist() == WEIGHTS[num_joints]


def test_known_values():
    # One pose; the prediction is off by 1 in x of a wrist (weight 4), the reconstruction by 1 in u of the root.
    model, noise = make_model(), torch.zeros(1, 17, 3)
    output = torch.zeros(1, 17, 5)
    output[0, 16, 0] = 1.0
    output[0, 0, 3] = 1.0
    loss = DiffusionLoss(model, TrainConfig(), torch.zeros(17, 3), torch.ones(17, 3))
    value = loss(Fixed(output), TrainBatch(torch.zeros(1, 17, 2), noise), torch.tensor([3]), noise)
    assert float(value) == pytest.approx((4.0 + 0.8) / (17 * 5))


@pytest.mark.parametrize("num_joints", [17, 16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_parity(num_joints, prediction_type, kind):
    model = make_model(num_joints=num_joints, prediction_type=prediction_type)
    network, batch, timesteps, noise = make_inputs(model, num_joints)
    loss = DiffusionLoss(model, TrainConfig(loss=kind), torch.zeros(num_joints, 3), torch.ones(num_joints, 3))
    value = loss(network, batch, timesteps, noise)

    signal, sigma = signal_of(model, timesteps)
    x0, epsilon = batch.poses_3d.double().numpy(), noise.double().numpy()
    np.testing.assert_allclose(network.seen[0].numpy(), signal * x0 + sigma * epsilon, atol=1e-5)
    assert torch.equal(network.seen[1], batch.condition) and torch.equal(network.seen[2], timesteps)
    targets = {"epsilon": epsilon, "sample": x0, "v_prediction": signal * epsilon - sigma * x0}
    target = np.concatenate((targets[prediction_type], batch.condition.double().numpy()), axis=-1)
    difference = np.abs(network.output.double().numpy() - target)
    if kind == "mse":
        difference = difference**2
    total = 0.0
    for joint, weight in enumerate(WEIGHTS[num_joints]):
        total += weight * (difference[:, joint, :3].sum() + 0.8 * difference[:, joint, 3:].sum())
    assert float(value) == pytest.approx(total / (6 * num_joints * 5), rel=1e-5)


def test_settings():
    model = make_model()
    network, batch, timesteps, noise = make_inputs(model)
    config = TrainConfig(joint_weights=False, reconstruction_weight=0.25)
    value = DiffusionLoss(model, config, torch.zeros(17, 3), torch.ones(17, 3))(network, batch, timesteps, noise)
    difference = (network.output - torch.cat((noise, batch.condition), dim=-1)).abs().double()
    expected = (3 * difference[..., :3].mean() + 0.25 * 2 * difference[..., 3:].mean()) / 5
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_presence_is_not_reconstructed():
    model = make_model(channels=3)
    network, batch, timesteps, noise = make_inputs(model, channels=3, outputs=6)
    loss = DiffusionLoss(model, TrainConfig(), torch.zeros(17, 3), torch.ones(17, 3))
    value = loss(network, batch, timesteps, noise)
    network.output = network.output[..., :5]
    assert float(value) == float(loss(network, TrainBatch(batch.condition[..., :2], batch.poses_3d), timesteps, noise))


def test_standardized_poses():
    model = make_model(PARALLEL, channels=3, prediction_type="sample")
    network, batch, timesteps, noise = make_inputs(model, channels=3, outputs=3)
    mean, scale = torch.randn(17, 3), 0.05 + torch.rand(17, 3)
    config = TrainConfig(joint_weights=False, loss="mse")
    value = DiffusionLoss(model, config, mean, scale)(network, batch, timesteps, noise)
    x0 = ((batch.poses_3d - mean) / scale).double().numpy()
    signal, sigma = signal_of(model, timesteps)
    np.testing.assert_allclose(network.seen[0].numpy(), signal * x0 + sigma * noise.numpy(), rtol=1e-4, atol=1e-4)
    weight = np.maximum(scale.double().numpy() / scale.double().numpy().mean(), 0.2)
    assert float(value) == pytest.approx((weight * (network.output.numpy() - x0) ** 2).mean(), rel=1e-5)


def test_draw():
    model = make_model()
    loss = DiffusionLoss(model, TrainConfig(), torch.zeros(17, 3), torch.ones(17, 3))
    timesteps, noise = loss.draw(20_000, torch.Generator().manual_seed(0))
    assert noise.shape == (20_000, 17, 3)
    assert abs(float(noise.mean())) < 5e-3 and abs(float(noise.std()) - 1.0) < 5e-3
    counts = torch.bincount(timesteps, minlength=100)  # uniform over the 100 steps: 200 each, deviation 14
    assert len(counts) == 100 and int(counts.min()) > 130 and int(counts.max()) < 270
    again = loss.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], timesteps) and torch.equal(again[1], noise)
