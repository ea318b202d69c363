"""The whole reverse process: hand-made values, ids, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffupose.engines.sample import sample
from diffupose.errors import BackendUnavailableError
from diffupose.ops.philox_normal import philox_normal
from diffupose.ops.reverse_step import reverse_step
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.schedule import NoiseSchedule, step_table


class Linear(nn.Module):
    """out = 0.5 x + the condition's x, y and 1 + t / 100, with a channel more than is needed."""

    def forward(self, x, condition, timesteps):
        third = (1.0 + timesteps / 100.0).view(-1, 1, 1).expand(*x.shape[:2], 1)
        return torch.cat((0.5 * x + torch.cat((condition[..., :2], third), dim=-1), x[..., :1]), dim=-1)


def table(steps=4, sampler="ddpm", **options):
    return step_table(NoiseSchedule(20), steps, sampler=sampler, **options)


def test_one_step_known_values():
    """With x0 prediction and one step the sample is the network's answer to the initial noise."""
    inputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    result = sample(Linear(), inputs, table(1, prediction_type="sample"), seed=3, num_hypotheses=2)
    noise = philox_normal(3, torch.arange(1), torch.arange(2), INITIAL_NOISE_STEP, 9).view(1, 2, 3, 3)
    third = torch.full((3, 1), 1.19)  # t = 19
    expected = 0.5 * noise + torch.cat((inputs[0], third), dim=-1)
    assert torch.allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_is_a_chain_of_reverse_steps(sampler, clip):
    inputs, steps, denoiser = torch.randn(2, 3, 2), table(4, sampler), Linear()
    frames, hypotheses = torch.tensor([9, -1]), torch.tensor([4, 7, 8])
    x = philox_normal(1, frames, hypotheses, INITIAL_NOISE_STEP, 9).view(2, 3, 3, 3)
    x0 = None
    for step in range(4):
        rows = inputs[:, None].expand(2, 3, 3, 2).flatten(0, 1)
        out = denoiser(x.flatten(0, 1), rows, torch.tensor([int(steps.timesteps[step])])).view(2, 3, 3, 4)
        x, x0 = reverse_step(
            x, out, steps.tensor(), step, x0_last=x0, seed=1, frame_ids=frames, hypothesis_ids=hypotheses,
            clip_sample_range=clip,
        )  # fmt: skip
    result = sample(
        denoiser, inputs, steps, seed=1, frame_ids=frames, hypothesis_ids=hypotheses, clip_sample_range=clip
    )
    assert torch.allclose(result, x, atol=1e-5)
    assert clip is None or float(result.abs().max()) <= clip


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_noise_scale(sampler):
    """One step of a table with a noise scale is the plain one with its noise multiplied by hand."""
    error = 0.1 + torch.rand(20, 3, 3).double().numpy()
    steps = table(4, sampler, prediction_error=error)
    coefficients, scale = steps.tensor(), steps.noise_scale_tensor()
    x, out, noise = torch.randn(3, 2, 5, 3, 3).unbind(0)
    for step in range(4):
        scaled, x0 = reverse_step(x, out, coefficients, step, noise=noise, noise_scale=scale)
        expected, _ = reverse_step(x, out, coefficients, step, noise=scale[step] * noise)
        assert torch.equal(scaled, expected) and bool(x0.isfinite().all())
    inputs, sampled = torch.randn(2, 3, 2), {"prediction_type": "sample"}
    small, large = (
        sample(Linear(), inputs, table(4, sampler, prediction_error=factor * error, **sampled), num_hypotheses=100)
        for factor in (0.01, 1.0)
    )
    assert float(small.std(dim=1).mean()) < 0.9 * float(large.std(dim=1).mean())
    with pytest.raises(ValueError, match=r"table must have a noise scale of 4 joints, got \(4, 3, 3\)"):
        sample(Linear(), torch.randn(2, 4, 2), steps, num_hypotheses=1)
    with pytest.raises(ValueError, match=r"noise_scale must have shape \[4, 3, 3\], got \(3, 3, 3\)"):
        reverse_step(x, out, coefficients, 0, noise=noise, noise_scale=scale[:3])


def test_hypothesis_ids_choose_the_noise():
    inputs = torch.randn(2, 3, 2)
    five = sample(Linear(), inputs, table(), num_hypotheses=5)
    some = sample(Linear(), inputs, table(), hypothesis_ids=torch.tensor([3, 1]))
    assert torch.allclose(some, five[:, [3, 1]], atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_edges(batch):
    assert sample(Linear(), torch.randn(batch, 1, 2), table(), num_hypotheses=2).shape == (batch, 2, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(3, 2)}, r"inputs must have shape \[B, J, C\], got \(3, 2\)"),
        ({"num_hypotheses": None}, "num_hypotheses must be at least 1 when hypothesis_ids is None, got None"),
        ({"num_hypotheses": 0}, "num_hypotheses must be at least 1"),
        ({"frame_ids": torch.arange(3)}, r"frame_ids must have shape \[2\], got \(3,\)"),
        ({"frame_ids": torch.zeros(2)}, "frame_ids must be int64"),
        ({"frame_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"frame_ids must have shape"),
        ({"hypothesis_ids": torch.zeros(2)}, "hypothesis_ids must be int64"),
        ({"frame_ids": torch.zeros((), dtype=torch.int64)}, r"frame_ids must have shape \[2\], got \(\)"),
        ({"hypothesis_ids": torch.zeros((), dtype=torch.int64)}, r"hypothesis_ids must have shape \[H\], got \(\)"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must not be negative, got -1.0"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
)
def test_errors(change, message):
    arguments = {"inputs": torch.zeros(2, 3, 2), "num_hypotheses": 2} | change
    with pytest.raises(ValueError, match=message):
        sample(Linear(), arguments.pop("inputs"), table(), **arguments)


def test_unavailable_backend():
    with pytest.raises(BackendUnavailableError, match='backend "cuda" is not available'):
        sample(Linear(), torch.zeros(2, 3, 2), table(), num_hypotheses=2, backend="cuda")


POSE = torch.zeros(1, 2, 3, 3)
COEFFICIENTS = table(4, "dpm++").tensor()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 3, 3)}, r"sample must have shape \[B, H, J, 3\], got \(2, 3, 3\)"),
        ({"sample": torch.zeros(1, 2, 3, 4)}, "sample must have shape"),
        ({"model_output": torch.zeros(1, 2, 3, 2)}, r"model_output must have shape \[1, 2, 3, '3 or more'\]"),
        ({"model_output": torch.zeros(1, 1, 3, 3)}, "model_output must have shape"),
        ({"model_output": torch.zeros(2, 3, 3)}, "model_output must have shape"),
        ({"coefficients": torch.zeros(4, 5)}, r"coefficients must have shape \[S, 6\] on the CPU, got \(4, 5\)"),
        ({"coefficients": torch.zeros(6)}, "coefficients must have shape"),
        ({"step": 4}, r"step must lie in \[0, 4\), got 4"),
        ({"step": -1}, r"step must lie in \[0, 4\), got -1"),
        ({"step": 1}, r"x0_last is needed by row 1 of this table"),
        ({"step": 1, "x0_last": torch.zeros(1, 2, 3)}, "x0_last must have the shape of sample"),
        ({"noise": torch.zeros(1, 1, 3, 3)}, "noise must have the shape of sample"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
)
def test_reverse_step_errors(change, message):
    arguments = {"sample": POSE, "model_output": POSE, "coefficients": COEFFICIENTS, "step": 0} | change
    with pytest.raises(ValueError, match=message):
        reverse_step(**arguments)


def test_reverse_step_draws_the_noise_of_its_ids():
    coefficients = table(4, "ddpm").tensor()
    frames, hypotheses = torch.tensor([5]), torch.tensor([2, 0])
    noise = philox_normal(7, frames, hypotheses, 1, 9).view(1, 2, 3, 3)
    drawn = reverse_step(POSE, POSE + 0.1, coefficients, 1, seed=7, frame_ids=frames, hypothesis_ids=hypotheses)
    given = reverse_step(POSE, POSE + 0.1, coefficients, 1, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))
    other = reverse_step(POSE, POSE + 0.1, coefficients, 1, seed=7)
    assert not torch.equal(drawn[0], other[0])


def test_antithetic_pairs_are_refused():
    with pytest.raises(ValueError, match="antithetic must be False"):
        sample(lambda x, condition, timesteps: x, torch.zeros(1, 4, 2), table(), num_hypotheses=2, antithetic=True)
