"""Every backend gives the same lift."""

from __future__ import annotations

import pytest
import torch
from support.sweeps import mostly_slow

from diffupose import Lifter
from diffupose.ops import _backend, available_backends


@pytest.mark.parametrize(
    "settings",
    mostly_slow([{"sampler": "ddim", "eta": 0.5, "flip": True}, {"sampler": "ddpm"}, {"sampler": "dpm++"}]),
    ids=lambda settings: settings["sampler"],
)
def test_same_hypotheses(settings, monkeypatch, device):
    """With one seed, hypotheses differ by at most 1e-4 m: rounding grows over the steps of a chain."""
    lifter = Lifter.from_pretrained(device=device.type)
    keypoints = 400.0 + 100.0 * torch.randn(1, 17, 2)
    settings = settings | {"image_size": (1280, 720), "num_hypotheses": 2, "num_inference_steps": 2, "seed": 0}
    expected = lifter(keypoints, backend="torch", **settings)
    steps = lifter(keypoints, backend="triton", **settings)
    assert (expected.meta["engine"], steps.meta["engine"]) == ("torch", "triton")
    # The network as it is, whose hook PyTorch must call, with all ops inside of it.
    hook = lifter.denoiser.register_forward_hook(lambda *given: None)
    monkeypatch.setattr(_backend, "_FROM_ENVIRONMENT", "triton")
    everything = lifter(keypoints, **settings)
    hook.remove()
    results = [steps, everything]
    if available_backends()["cpp"][0] and device.type == "cpu":
        results.append(lifter(keypoints, backend="cpp", **settings))
    for result in results:
        torch.testing.assert_close(result.hypotheses, expected.hypotheses, rtol=0, atol=1e-4)
        torch.testing.assert_close(result.covariance, expected.covariance, rtol=0, atol=1e-4, equal_nan=True)
