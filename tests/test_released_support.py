"""Checks of the test support itself: the NumPy network, the written checkpoints and the NumPy sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.reference_sampler import cosine_betas, ddpm_sample, released_schedule
from support.released_checkpoint import EMA_KEYS, RELEASED_KEYS, SCHEDULE_KEYS, random_state, write_released_checkpoint
from support.released_network import released_adjacency, released_forward

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _is_parameter(key: str) -> bool:
    return key not in SCHEDULE_KEYS and not key.endswith(_BATCH_NORM_BUFFERS)


def _count(state: dict[str, np.ndarray], part: str = "") -> int:
    return sum(value.size for key, value in state.items() if _is_parameter(key) and part in key)


def _inputs(batch: int, num_joints: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x_t = rng.normal(size=(batch, num_joints, 3))
    cond = rng.uniform(-1.0, 1.0, size=(batch, num_joints, 2))
    return x_t, cond, rng.integers(0, 100, size=batch)


def _torch_forward(
    state: dict[str, np.ndarray], x_t: np.ndarray, cond: np.ndarray, timestep: np.ndarray
) -> torch.Tensor:
    """The same network with torch's own layers, in the layouts [B, d, J] and [B, d, 1, J] of the released code."""
    net = {key.removeprefix("denoise_fn."): torch.from_numpy(value).double() for key, value in state.items()}
    num_joints = x_t.shape[1]
    adjacency = torch.from_numpy(released_adjacency(num_joints))
    eye = torch.eye(num_joints, dtype=torch.float64)

    def graph_conv(name: str, x: torch.Tensor) -> torch.Tensor:
        mask = net[f"{name}.M"]
        mixing = adjacency + net[f"{name}.adj2"]
        mixing = (mixing + mixing.T) / 2
        own, other = x @ net[f"{name}.W"][0], x @ net[f"{name}.W"][1]
        return (mixing * eye) @ (mask * own) + (mixing * (1 - eye)) @ (mask * other) + net[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = (net[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, training=False, eps=1e-5)

    def graph_block(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu(norm(f"{name}.bn", graph_conv(f"{name}.gconv", x).transpose(1, 2))).transpose(1, 2)

    def layer(function: Callable[..., torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return function(x, net[f"{name}.weight"], net[f"{name}.bias"])

    size = net["time_mlp.1.weight"].shape[1]
    frequencies = torch.exp(torch.arange(size // 2, dtype=torch.float64) * -(math.log(1e4) / (size // 2 - 1)))
    angles = torch.from_numpy(timestep).double()[:, None] * frequencies
    time = layer(F.linear, "time_mlp.1", torch.cat([angles.sin(), angles.cos()], dim=-1))
    time = layer(F.linear, "time_mlp.3", F.gelu(time))

    def time_block(name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift = layer(F.linear, f"{name}.mlp.1", F.silu(time))[:, None].chunk(2, dim=-1)
        return F.silu(x * (1 + scale) + shift)

    x = graph_block("gconv_input.0", torch.from_numpy(np.concatenate([x_t, cond], axis=-1)))
    for index in range(4):
        name = f"gconv_layers.{index}"
        x = x + graph_block(f"{name}.gconv2", graph_block(f"{name}.gconv1", x))
    x = time_block("block1", x)
    image = x.transpose(1, 2).unsqueeze(2)
    theta, phi, value = (layer(F.conv2d, f"non_local.{name}", image).flatten(2) for name in ("theta", "phi", "g"))
    attended = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1) @ value.transpose(1, 2)
    attended = layer(F.conv2d, "non_local.W.0", attended.transpose(1, 2).unsqueeze(2))
    image = norm("non_local.W.1", attended) + image
    x = time_block("block2", image.squeeze(2).transpose(1, 2))
    return graph_conv("gconv_output", x)


def test_key_counts() -> None:
    assert len(RELEASED_KEYS) == len(set(RELEASED_KEYS)) == 121
    assert len(EMA_KEYS) == len(set(EMA_KEYS)) == 244
    assert len(SCHEDULE_KEYS) == 13
    assert set(random_state(32, 16, seed=0)) == set(RELEASED_KEYS)


@pytest.mark.parametrize(
    ("d", "num_joints", "parameters", "block3"),
    [
        (384, 17, 3_226_852, 148_224),
        (384, 16, 3_223_061, 148_224),
        (256, 17, 1_453_860, 66_048),
        (256, 16, 1_451_221, 66_048),
        (128, 17, 379_236, 16_640),
        (128, 16, 377_749, 16_640),
    ],
)
def test_parameter_counts(d: int, num_joints: int, parameters: int, block3: int) -> None:
    state = random_state(d, num_joints, seed=0)
    assert _count(state) == parameters
    assert _count(state, ".block3.") == block3


def test_parameter_counts_by_part() -> None:
    state = random_state(384, 16, seed=0)
    expected = {
        "gconv_input": 11_392,
        "gconv_layers": 2_419_712,
        "gconv_output": 4_181,
        "non_local": 296_640,
        "time_mlp": 46_464,
        "block1": 148_224,
        "block2": 148_224,
    }
    assert {part: _count(state, f".{part}.") for part in expected} == expected


def test_state_types_and_shapes() -> None:
    state = random_state(64, 17, seed=3, timesteps=50)
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            assert value.dtype == np.int64 and value.shape == ()
        else:
            assert value.dtype == np.float32, key
            assert np.isfinite(value).all(), key
            assert key in SCHEDULE_KEYS or np.ptp(value) > 0, key
        if key in SCHEDULE_KEYS:
            assert value.shape == (50,)
        if key.endswith("running_var"):
            assert (value > 0).all()
        if key.endswith("adj2"):
            assert np.abs(value - value.T).max() > 0.1
    assert state["denoise_fn.gconv_input.0.gconv.W"].shape == (2, 5, 64)
    assert state["denoise_fn.gconv_output.M"].shape == (17, 5)
    assert state["denoise_fn.non_local.g.weight"].shape == (32, 64, 1, 1)
    assert state["denoise_fn.non_local.W.0.weight"].shape == (64, 32, 1, 1)
    assert state["denoise_fn.time_mlp.1.weight"].shape == (32, 8)
    assert state["denoise_fn.block3.mlp.1.weight"].shape == (128, 32)


@pytest.mark.parametrize("d", [16, 40])
def test_state_rejects_bad_width(d: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        random_state(d, 16, seed=0)


@pytest.mark.parametrize("num_joints", [15, 16, 17])
def test_adjacency(num_joints: int) -> None:
    adjacency = released_adjacency(num_joints)
    np.testing.assert_allclose(adjacency.sum(axis=1), 2.0, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(np.diag(adjacency), 1.0)
    np.testing.assert_array_equal(adjacency > 0, adjacency.T > 0)
    assert np.abs(adjacency - adjacency.T).max() > 0.1
    pelvis = np.zeros(num_joints)
    pelvis[0] = 1.0
    pelvis[{15: [1, 8, 11], 16: [1, 4, 7], 17: [1, 4, 7]}[num_joints]] = 1.0 / 3.0
    np.testing.assert_array_equal(adjacency[0], pelvis)


def test_adjacency_thorax() -> None:
    row = released_adjacency(17)[8]
    expected = np.zeros(17)
    expected[[7, 9, 11, 14]] = 0.25
    expected[8] = 1.0
    np.testing.assert_array_equal(row, expected)
    with pytest.raises(ValueError, match="15, 16 or 17"):
        released_adjacency(18)


@pytest.mark.parametrize(("d", "num_joints"), [(32, 15), (64, 16), (64, 17), (384, 17)])
def test_forward_matches_torch_layers(d: int, num_joints: int) -> None:
    state = random_state(d, num_joints, seed=d + num_joints)
    inputs = _inputs(4, num_joints)
    result = released_forward(state, *inputs)
    assert result.shape == (4, num_joints, 5) and result.dtype == np.float64
    assert 0.3 < result.std() < 5.0
    np.testing.assert_allclose(result, _torch_forward(state, *inputs).numpy(), rtol=0, atol=1e-11)


def test_forward_reads_every_live_tensor() -> None:
    state = random_state(32, 16, seed=1)
    inputs = _inputs(3, 16)
    base = released_forward(state, *inputs)
    rng = np.random.default_rng(2)
    for key, value in state.items():
        dead = key in SCHEDULE_KEYS or ".block3." in key or key.endswith("num_batches_tracked")
        changed = value + 1 if value.ndim == 0 else value * rng.uniform(1.05, 1.2, size=value.shape)
        difference = np.abs(released_forward({**state, key: changed}, *inputs) - base).max()
        # A shift of all phi biases moves every logit of a row alike, so the softmax hides it.
        if dead:
            assert difference == 0.0, key
        elif key != "denoise_fn.non_local.phi.bias":
            assert difference > 1e-4, (key, difference)


@pytest.mark.parametrize("num_joints", [16, 17])
def test_written_checkpoint(tmp_path: Path, num_joints: int) -> None:
    path = tmp_path / "best_model.pt"
    state = write_released_checkpoint(path, 32, num_joints, seed=5)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {"step", "model", "ema", "scaler"}
    assert isinstance(checkpoint["step"], int) and isinstance(checkpoint["scaler"], dict)
    model, ema = checkpoint["model"], checkpoint["ema"]
    assert set(model) == {f"module.{key}" for key in RELEASED_KEYS}
    assert set(ema) == set(EMA_KEYS)
    assert ema["initted"].shape == (1,)
    assert ema["step"].shape == (1,) and ema["step"].dtype == torch.int64
    for key, value in state.items():
        averaged, online = ema[f"ema_model.module.{key}"].numpy(), ema[f"online_model.module.{key}"].numpy()
        assert averaged.dtype == value.dtype and averaged.shape == value.shape
        np.testing.assert_array_equal(averaged, value)
        np.testing.assert_array_equal(online, model[f"module.{key}"].numpy())
        assert np.array_equal(online, averaged) == (key in SCHEDULE_KEYS), key


def test_schedule() -> None:
    schedule = released_schedule(100)
    assert tuple(schedule) == SCHEDULE_KEYS
    betas, cumprod, previous = (schedule[key] for key in ("betas", "alphas_cumprod", "alphas_cumprod_prev"))
    assert betas.max() == betas[-1] == 0.999
    assert cumprod[-1] == pytest.approx(2.4e-7, rel=0.02)
    # One reverse step with the true pose carries the marginal of x_t to the marginal of x_(t-1).
    first, second, variance = (
        schedule[key] for key in ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance")
    )
    np.testing.assert_allclose(first + second * np.sqrt(cumprod), np.sqrt(previous), rtol=1e-12)
    np.testing.assert_allclose(second**2 * (1 - cumprod) + variance, 1 - previous, rtol=0, atol=1e-14)


@pytest.mark.parametrize("clip", [1.0, None])
def test_sampler_finds_a_known_pose(clip: float | None) -> None:
    rng = np.random.default_rng(0)
    pose = rng.normal(0.0, 0.8, size=(2, 17, 3))
    cumprod = np.cumprod(1.0 - cosine_betas(100))
    visited = []

    def forward(x: np.ndarray, cond: np.ndarray, t: np.ndarray) -> np.ndarray:
        visited.append(int(t[0]))
        level = cumprod[t][:, None, None]
        return (x - np.sqrt(level) * pose) / np.sqrt(1.0 - level)

    noise = rng.normal(size=(100, 2, 17, 3))
    noise[-1] = np.nan
    result = ddpm_sample(forward, rng.normal(size=pose.shape), np.zeros((2, 17, 2)), noise, clip=clip)
    assert visited == list(range(99, -1, -1))
    assert np.abs(pose).max() > 1.0
    np.testing.assert_allclose(result, pose if clip is None else np.clip(pose, -1, 1), rtol=0, atol=1e-10)


def test_sampler_one_step_by_hand() -> None:
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(3, 16, 3)), rng.normal(size=(2, 3, 16, 3))
    schedule = released_schedule(2)
    seen = []

    def forward(x: np.ndarray, cond: np.ndarray, t: np.ndarray) -> np.ndarray:
        seen.append(x)
        return 0.5 * x

    result = ddpm_sample(forward, x, np.zeros((3, 16, 2)), noise, T=2)

    def mean(x: np.ndarray, t: int) -> np.ndarray:
        pose = schedule["sqrt_recip_alphas_cumprod"][t] * x - schedule["sqrt_recipm1_alphas_cumprod"][t] * 0.5 * x
        return schedule["posterior_mean_coef1"][t] * np.clip(pose, -1, 1) + schedule["posterior_mean_coef2"][t] * x

    middle = mean(x, 1) + np.exp(0.5 * schedule["posterior_log_variance_clipped"][1]) * noise[0]
    np.testing.assert_allclose(seen[1], middle, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result, mean(middle, 0), rtol=0, atol=1e-12)


def test_sampler_runs_the_network() -> None:
    state = random_state(32, 17, seed=9)
    x, cond, _ = _inputs(2, 17, seed=4)
    noise = np.random.default_rng(6).normal(size=(100, 2, 17, 3))
    result = ddpm_sample(lambda x, c, t: released_forward(state, x, c, t)[..., :3], x, cond, noise)
    assert result.shape == (2, 17, 3)
    assert np.abs(result).max() <= 1.0 + 1e-12


def test_sampler_rejects_bad_shapes() -> None:
    x, cond = np.zeros((1, 16, 3)), np.zeros((1, 16, 2))
    with pytest.raises(ValueError, match="noise must have shape"):
        ddpm_sample(lambda x, c, t: x, x, cond, np.zeros((99, 1, 16, 3)))
    with pytest.raises(ValueError, match="forward must return"):
        ddpm_sample(lambda x, c, t: np.zeros((1, 16, 5)), x, cond, np.zeros((100, 1, 16, 3)))
