"""The released network: its size, its checkpoint, and its forward pass against an independent float64 one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reference_sampler import ddpm_sample
from support.released_checkpoint import write_released_checkpoint
from support.released_network import released_forward

from diffupose import Lifter
from diffupose.config import PAPER, DenoiserConfig
from diffupose.engines.sample import sample
from diffupose.networks.build import build_denoiser, load_lifter_file
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP, philox_normal
from diffupose.skeleton import H36M_16, H36M_17, HUMANEVA_15, skeleton_by_num_joints


@pytest.mark.parametrize(
    ("hidden_dim", "skeleton", "live"),
    [
        (384, H36M_17, 3_078_628),
        (256, H36M_17, 1_387_812),
        (384, H36M_16, 3_223_061 - 148_224),
        (128, H36M_16, 377_749 - 16_640),
    ],
    ids=["d384-J17", "d256-J17", "d384-J16", "d128-J16"],
)
def test_parameter_count(hidden_dim, skeleton, live):
    denoiser = build_denoiser(replace(PAPER.denoiser, hidden_dim=hidden_dim, skeleton=skeleton.name))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == live


@pytest.fixture
def float64():
    """Networks are built in float64 inside the test: constants, too, are not rounded to float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_joints", [17, 16, 15])
def test_forward_equals_the_independent_one(tmp_path, num_joints):
    path = tmp_path / "best_model.pt"
    state = write_released_checkpoint(path, 64, num_joints, seed=num_joints)
    file = load_lifter_file(path)
    assert file.config.denoiser.skeleton == skeleton_by_num_joints(num_joints).name
    generator = np.random.default_rng(0)
    x_t, condition = generator.normal(size=(5, num_joints, 3)), generator.normal(size=(5, num_joints, 2))
    timesteps = np.array([0, 1, 42, 98, 99])
    expected = released_forward(state, x_t, condition, timesteps)
    output = file.denoiser(torch.from_numpy(x_t), torch.from_numpy(condition), torch.from_numpy(timesteps)).numpy()
    assert output.shape == (5, num_joints, 5)
    assert np.abs(output - expected).max() <= 1e-9 * np.abs(expected).max()


def test_full_size_checkpoint_needs_no_options(tmp_path):
    path = tmp_path / "best_model.pt"
    state = write_released_checkpoint(path, 384, 16, seed=3)
    lifter = Lifter.from_pretrained(path)
    assert sum(value.size for key, value in state.items() if "block3" in key) == 148_224
    assert (lifter.skeleton.num_joints, lifter.config.denoiser.hidden_dim) == (16, 384)
    settings = lifter.config.sampling
    assert (settings.sampler, settings.num_inference_steps, settings.num_hypotheses) == ("ddpm", 100, 10)
    assert settings.flip
    assert lifter.config.input_normalization == "image"
    assert lifter.config.diffusion.clip_sample_range == 1.0
    weight = lifter.denoiser.state_dict()["gconv_layers.2.1.gconv.weight"].numpy()
    assert np.array_equal(weight, state["denoise_fn.gconv_layers.2.gconv2.gconv.W"])  # the averaged weights


def test_sampling_equals_an_independent_ddpm_loop(tmp_path):
    """The whole reverse process in float64, teacher: NumPy network, NumPy DDPM formulas, the same noise."""
    path = tmp_path / "best_model.pt"
    state = write_released_checkpoint(path, 32, 17, seed=5)
    lifter = Lifter.from_pretrained(path, device="cpu")
    condition = np.random.default_rng(1).normal(size=(2, 17, 2))
    ids, one = torch.arange(2), torch.arange(1)
    noise = {step: philox_normal(9, ids, one, step, 51).view(2, 17, 3).double().numpy() for step in range(99)}
    x_last = philox_normal(9, ids, one, INITIAL_NOISE_STEP, 51).view(2, 17, 3).double().numpy()
    expected = ddpm_sample(
        lambda x, c, t: released_forward(state, x, c, np.full(len(x), t) if np.ndim(t) == 0 else t)[..., :3],
        x_last,
        condition,
        np.stack([noise.get(step, np.zeros((2, 17, 3))) for step in range(100)]),
    )
    lifter.denoiser.double()
    table = lifter.step_table(lifter.config.sampling)
    actual = sample(
        lifter.denoiser,
        torch.from_numpy(condition),
        table,
        seed=9,
        num_hypotheses=1,
        clip_sample_range=1.0,
    )
    # The step table is float32: a few units of 1e-7 a step, not amplified thanks to clipping.
    assert np.abs(actual[:, 0].numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(
    "change",
    [{"adjacency_mask": True}, {"adjacency_normalization": "symmetric"}, {"time_blocks": "between"}],
    ids=["mask-P", "symmetric", "time-between"],
)
def test_paper_options_are_off_by_default_and_change_the_network(change):
    assert all(getattr(PAPER.denoiser, name) != value for name, value in change.items())
    config = DenoiserConfig(hidden_dim=32, **change)
    torch.manual_seed(0)
    plain = build_denoiser(DenoiserConfig(hidden_dim=32)).eval()
    torch.manual_seed(0)
    changed = build_denoiser(config).eval()
    if config.adjacency_mask:
        # P starts as 1 and changes nothing until it is learned.
        with torch.no_grad():
            for module in changed.modules():
                if getattr(module, "adjacency_mask", None) is not None:
                    module.adjacency_mask.mul_(0.5)
    inputs = torch.randn(3, 17, 3), torch.randn(3, 17, 2), torch.tensor([0, 5, 99])
    assert changed(*inputs).shape == (3, 17, 5)
    assert not torch.allclose(plain(*inputs), changed(*inputs))


def test_humaneva_has_fifteen_joints():
    denoiser = build_denoiser(DenoiserConfig(hidden_dim=32, skeleton=HUMANEVA_15.name)).eval()
    assert denoiser(torch.randn(2, 15, 3), torch.randn(2, 15, 2), torch.tensor([3])).shape == (2, 15, 5)


@pytest.mark.parametrize("content", ["half", "pickle", "other"])
def test_damaged_or_other_files_are_refused(tmp_path, content):
    path: Path = tmp_path / "best_model.pt"
    if content == "half":
        write_released_checkpoint(path, 32, 17, seed=0)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "pickle":
        torch.save({"hello": [1, 2, 3]}, path)
    else:
        path.write_text("not a checkpoint at all, but long enough to look at")
    with pytest.raises(ValueError, match=r"best_model\.pt"):
        load_lifter_file(path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    import pickle

    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"model\.pt"):
        load_lifter_file(path)
    assert not marker.exists()
