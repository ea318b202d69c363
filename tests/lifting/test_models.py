"""The Lifter: released checkpoints, saving and loading, defaults, and errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.lifts import SIZE, difference
from support.released_checkpoint import write_released_checkpoint
from support.tiny_lifters import people, tiny_lifter, write_tiny_lifter

import diffupose.lifting.chunks
from diffupose import Lifter
from diffupose.skeleton import H36M_17
from diffupose.testing import requires_cpp

# --- the released checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[16, 17], ids=["J16", "J17"])
def released(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "best_model.pt"
    write_released_checkpoint(path, 32, request.param, seed=1)
    return Lifter.from_pretrained(path, device="cpu")


def test_released_defaults(released):
    result = released(people(1), image_size=SIZE)
    joints = released.skeleton.num_joints
    assert result.hypotheses.shape == (1, 20, joints, 3)  # N = 10 and their flipped twins
    meta = {key: result.meta[key] for key in ("sampler", "num_inference_steps", "num_hypotheses", "flip")}
    assert meta == {"sampler": "ddpm", "num_inference_steps": 100, "num_hypotheses": 10, "flip": True}
    assert result.meta["input_normalization"] == "image"
    assert result.meta["focal_length_px"] is result.meta["assumed_focal"] is None
    # Clipped to 1 m per axis, then root-relative; the last step of the reverse process is x0 itself.
    assert float(result.hypotheses.abs().max()) <= 2.0
    with pytest.raises(ValueError, match="image_size must be given"):
        released(people(1))


def test_released_fits_few_steps_and_other_samplers(released):
    for sampler in ("ddim", "dpm++"):
        result = released(people(1), image_size=SIZE, sampler=sampler, num_inference_steps=5, num_hypotheses=2)
        assert bool(torch.isfinite(result.hypotheses).all())
        assert result.meta["sampler"] == sampler


# --- saving, loading, progress ---------------------------------------------------------------------------------------


def test_save_pretrained_gives_the_same_lifter(lifter, tmp_path):
    lifter.save_pretrained(tmp_path / "again.safetensors")
    again = Lifter.from_pretrained(tmp_path / "again.safetensors", device="cpu")
    assert again.config == lifter.config
    first, second = (item(people(2), image_size=SIZE) for item in (lifter, again))
    assert torch.equal(first.hypotheses, second.hypotheses)
    assert torch.equal(first.covariance, second.covariance)


def test_a_bundled_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mocap").mkdir()
    assert Lifter.from_pretrained(device="cpu").skeleton == H36M_17
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Lifter.from_pretrained("./mocap", device="cpu")


def test_unknown_model_and_device(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model must be a file or a bundled name \(mocap\), got 'nonsense'"):
        Lifter.from_pretrained("nonsense")
    path = write_tiny_lifter(tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="device must be auto or one that PyTorch can use here, got 'abacus'"):
        Lifter.from_pretrained(path, device="abacus")
    assert Lifter.from_pretrained(str(path), device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize(("progress", "bar"), [(True, True), (False, False), (None, False)])
def test_progress_bar_on_long_work(person_lifter, progress, bar, capsys, monkeypatch):
    monkeypatch.setattr(diffupose.lifting.chunks, "tqdm", lambda **options: original(**(options | {"delay": 0.0})))
    original = __import__("tqdm").tqdm
    person_lifter(people(1), image_size=SIZE, progress=progress)
    captured = capsys.readouterr()
    assert ("pose" in captured.err) is bar  # captured output is no terminal
    assert captured.out == ""


def test_short_work_shows_no_bar(person_lifter, capsys):
    person_lifter(people(1), image_size=SIZE, progress=True)
    assert capsys.readouterr().err == ""


def test_defaults_come_from_the_checkpoint(person_lifter):
    assert person_lifter(people(1), image_size=SIZE).meta["num_inference_steps"] == 3
    settings = person_lifter.sampling(sampler=None, num_hypotheses=np.int64(7), eta=0.5)
    assert settings == replace(person_lifter.config.sampling, num_hypotheses=7, eta=0.5)
    assert isinstance(settings.num_hypotheses, int)
    # A checkpoint's eta belongs to ddim alone.
    eta = Lifter.sampling.__get__(person_lifter)(eta=1.0)
    assert eta.eta == 1.0
    assert person_lifter.sampling(sampler="ddpm").eta == 0.0


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=requires_cpp)])
def test_poses_are_the_same_whatever_the_default_dtype(tmp_path, backend):
    expected = tiny_lifter(tmp_path)(people(2), image_size=SIZE, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        lifter = Lifter.from_pretrained(tmp_path / "person.safetensors", device="cpu")
        result = lifter(people(2), image_size=SIZE, backend=backend)
        assert result.covariance.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(result.hypotheses, expected.hypotheses) < 1e-5


@pytest.mark.filterwarnings("ignore:the covariance was calibrated for")
def test_settings_change_the_result(person_lifter):
    base = person_lifter(people(1), image_size=SIZE).hypotheses
    for change in ({"num_inference_steps": 5}, {"eta": 1.0}, {"sampler": "ddpm"}, {"timestep_spacing": "leading"}):
        assert difference(person_lifter(people(1), image_size=SIZE, **change).hypotheses, base) > 1e-5, change


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hypotheses": 0}, "num_hypotheses must be a whole number of at least 1, got 0"),
        ({"num_hypotheses": -1}, "num_hypotheses must be"),
        ({"num_hypotheses": 1.5}, "num_hypotheses must be"),
        ({"num_hypotheses": True}, "num_hypotheses must be"),
        ({"num_hypotheses": 10**12}, "num_hypotheses must be at most"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"num_inference_steps": 100000}, "num_inference_steps must be an integer between 1 and 50"),
        ({"eta": 2.0}, "eta must be a number between 0 and 1"),
        ({"eta": float("nan")}, "eta must be"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta must lie in"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim"),
        ({"timestep_spacing": "log"}, "timestep_spacing must be one of"),
        ({"aggregation": "median"}, "aggregation must be one of mean, medoid"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"seed": -(2**63) - 1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"frame_ids": [0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [0.0, 1.0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [[0, 1]]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [2**64, 0]}, "frame_ids must be 2 integers"),
        ({"frame_ids": [True, False]}, "frame_ids must be 2 integers"),
        ({"assumed_focal": "x"}, "assumed_focal must be in longer image sides, 0.05 to 100, or None, got x"),
        ({"assumed_focal": [1.15]}, "assumed_focal must be"),
        ({"assumed_focal": 0.0}, "assumed_focal must be"),
        ({"assumed_focal": float("nan")}, "assumed_focal must be"),
        ({"assumed_focal": float("inf")}, "assumed_focal must be"),
        ({"image_size": None}, "image_size must be given"),
        ({"on_unusable": "skip"}, "on_unusable must be error or nan"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(person_lifter, change, message):
    with pytest.raises(ValueError, match=message):
        person_lifter(people(2), **({"image_size": SIZE} | change))


def test_steps_that_the_covariance_was_not_calibrated_for_are_told(person_lifter, tmp_path):
    seen = {"keypoints": people(1), "image_size": SIZE}
    with warnings.catch_warnings(action="error"):
        person_lifter(**seen)
        person_lifter(**seen, num_inference_steps=2, num_hypotheses=3)  # which have no covariance
        fresh = tiny_lifter(tmp_path)
        fresh.covariance_scale = torch.ones(17)  # of a model that nobody calibrated
        fresh(**seen, num_inference_steps=2)
    with pytest.warns(UserWarning, match="the covariance was calibrated for num_inference_steps 3: its regions may"):
        person_lifter(**seen, num_inference_steps=2)
    with pytest.warns(UserWarning, match="calibrated for num_inference_steps 3, eta 0.0: "):
        person_lifter(**seen, num_inference_steps=2, eta=0.5)
    with pytest.warns(UserWarning, match="calibrated for flip False: "):
        person_lifter(**seen, num_hypotheses=2, flip=True)  # four of them
