"""Calibration: the prediction error of a model whose error is known, and factors that undo a wrong spread."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from support.tiny_lifters import tiny_config, write_tiny_lifter
from torch import nn

from diffupose import Lifter
from diffupose.cli import main
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, load_mocap
from diffupose.evaluation.fit_uncertainty import calibration_cells, fit_covariance_scale, measure_prediction_error
from diffupose.networks.build import LifterFile

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = resources.files("diffupose") / "data" / "sample_uiprmd.npz"


@pytest.fixture(scope="module")
def cells():
    with resources.as_file(SAMPLE) as path:
        return calibration_cells(load_mocap(path, include=SAMPLE_SUBJECTS), 60)


class Share(nn.Module):
    """Predicts half of x_t, whatever it means."""

    def forward(self, sample, condition, timesteps):
        return 0.5 * sample


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_prediction_error(cells, prediction_type):
    config = tiny_config()
    diffusion = replace(config.diffusion, prediction_type=prediction_type)
    lifter = Lifter(LifterFile(replace(config, diffusion=diffusion), Share(), torch.zeros(17, 3),
                               torch.full((17, 3), 0.2), torch.ones(17)))  # fmt: skip
    measured = measure_prediction_error(lifter, cells).double().numpy()
    assert measured.shape == (50, 17, 3)
    assert np.array_equal(measured[:, 1], measured[:, 4])  # the hips, right and left
    measured = measured[:, 1:].mean(axis=(1, 2))
    # The turn towards the person keeps lengths, so poses need not be turned to know their mean square.
    poses = torch.cat([cell.views.poses_3d for cell in cells])[:, 1:] / 0.2
    square = float(poses.square().mean())
    signal, sigma = np.sqrt(lifter.schedule.alphas_cumprod), np.sqrt(1 - lifter.schedule.alphas_cumprod)
    # x0 hat - x0 as a share of x0 and one of the noise, worked out by hand for an output of x_t / 2.
    share, noise = {
        "sample": (0.5 * signal - 1, 0.5 * sigma),
        "epsilon": (-0.5 * sigma, (1 - 0.5 * sigma) * sigma / signal),
        "v_prediction": (signal * (signal - 0.5 * sigma) - 1, sigma * (signal - 0.5 * sigma)),
    }[prediction_type]
    expected = share**2 * square + noise**2
    np.testing.assert_allclose(measured[[0, -1]], expected[[0, -1]], rtol=0.03)
    # Interpolated between measurements; epsilon's error grows a thousandfold over the last three timesteps.
    assert abs(np.log(measured / expected))[:-4].max() < 0.35


def test_covariance_scale_undoes_a_wrong_spread(cells, tmp_path):
    """Around the truth by draws of known spread: factors 1; twice the spread: 1/4; by joint."""
    lifter = Lifter.from_pretrained(write_tiny_lifter(tmp_path / "tiny.safetensors"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    spread = torch.ones(17, 1)
    spread[9:] = 2.0
    covariance = torch.tensor([0.03, 0.02, 0.1])
    truths = iter([cell.views.poses_3d for cell in cells])

    class Result:
        def __init__(self):
            truth = next(truths)
            center = truth + torch.randn(len(truth), 17, 3, generator=generator) * covariance
            draws = torch.randn(len(truth), 50, 17, 3, generator=generator)
            self.hypotheses = center[:, None] + draws * covariance * spread

    lifter.__class__ = type("Fake", (Lifter,), {"__call__": lambda self, *_, **__: Result()})
    scale = fit_covariance_scale(lifter, cells)
    assert float(scale[0]) == 1.0
    assert float(scale[1:9].log().mean().exp()) == pytest.approx(1.0, rel=0.15)
    assert float(scale[9:].log().mean().exp()) == pytest.approx(0.25, rel=0.15)


def test_command(tmp_path, capsys):
    model, out = write_tiny_lifter(tmp_path / "tiny.safetensors"), tmp_path / "calibrated.safetensors"
    with resources.as_file(SAMPLE) as path:
        arguments = ["calibrate", "--model", str(model), "--data", str(path), "--out", str(out), "--num-poses", "20",
                     "--subjects", "uiprmd_s06"]  # fmt: skip
        settings = ["--set", "num_inference_steps=2", "timestep_spacing=quadratic", "variance=analytic"]
        assert main([*arguments, *settings]) == 0
        printed = capsys.readouterr().out
        assert "covariance factors, by joint: 1.00 " in printed
        assert "dispersion on wild noisy keypoints, N = 10, before any factor: " in printed
        assert printed.count("calibration error (ECE) with the factors, N = 10: 0.") == 2
        lifter = Lifter.from_pretrained(out, device="cpu")
        assert lifter.prediction_error.shape == (50, 17, 3) and bool((lifter.covariance_scale > 0).all())
        assert (lifter.config.sampling.variance, lifter.config.sampling.num_inference_steps) == ("analytic", 2)
        assert main([*arguments, *settings, "--noise-factor", "5"]) == 0
        torch.testing.assert_close(
            Lifter.from_pretrained(out, device="cpu").prediction_error, 5 * lifter.prediction_error
        )
        assert main([*arguments, *settings, "--noise-factor", "1", "2", "3"]) == 0
        torch.testing.assert_close(
            Lifter.from_pretrained(out, device="cpu").prediction_error,
            torch.tensor([1.0, 2.0, 3.0]) * lifter.prediction_error,
        )
        assert "joints lie at the end of what is tried, 0.2 to 10: " in capsys.readouterr().err  # an untrained model
        # What a lift does, too: of a model whose default is analytic, dpm++ takes the only variance that it has.
        analytic = tmp_path / "analytic.safetensors"
        out.rename(analytic)
        arguments[arguments.index(str(model))] = str(analytic)
        assert main([*arguments, "--set", "sampler=dpm++"]) == 0
        sampling = Lifter.from_pretrained(out, device="cpu").config.sampling
        assert (sampling.sampler, sampling.variance) == ("dpm++", "fixed_small")
        capsys.readouterr()
        arguments[arguments.index(str(analytic))] = str(model)
        out.unlink()
        for wrong, message in ((["--set", "steps=2"], "--set must look like eta=0.5, with one of sampler,"),
                               (["--set", "num_inference_steps=51"], "must be an integer between 1 and 50, got 51"),
                               (["--set", "sampler=dpm++", "variance=analytic"], "variance must be fixed_small with"),
                               (["--subjects", "nobody"], "'nobody'"),
                               (["--noise-factor", "0"], "--noise-factor must be 1 or 3 numbers, positive"),
                               (["--noise-factor", "1", "2"], "at most 100, got 1 2"),
                               (["--noise-factor", "2"], "--noise-factor is for variance analytic, this model has"),
                               (["--out", str(model)], "--out must not be --model"),
                               (["--out", str(path)], "--out must not be --data"),
                               (["--out", str(tmp_path / "model.npz")], "--out must end in .safetensors, got "),
                               (["--num-poses", "1"], "--num-poses must be at least 2, got 1")):  # fmt: skip
            assert main([*arguments, *wrong]) == 2
            captured = capsys.readouterr()
            assert message in captured.err and captured.err.count("\n") == 1 and not out.exists()
