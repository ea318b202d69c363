"""The released DiffuPose network in float64 NumPy: a slow, plain forward pass to check the library against.

Nothing here imports the library or torch. The state uses the key names of the released checkpoint, without any prefix
(``denoise_fn.gconv_input.0.gconv.W`` and so on).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

_PARENTS = {
    15: (-1, 0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 0, 11, 12, 1),
    16: (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 8, 10, 11, 8, 13, 14),
    17: (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15),
}
_BATCH_NORM_EPS = 1e-5
_erf = np.vectorize(math.erf, otypes=[np.float64])


def released_adjacency(num_joints: int) -> np.ndarray:
    """Return the adjacency ``[J, J]``, float64: row-normalised neighbours with the diagonal overwritten by 1.

    Args:
        num_joints: 15 (HumanEva), 16 (Human3.6M without Neck/Nose) or 17 (Human3.6M).

    Raises:
        ValueError: If there is no skeleton with this many joints.
    """
    if num_joints not in _PARENTS:
        raise ValueError(f"num_joints must be 15, 16 or 17, got {num_joints}")
    adjacency = np.zeros((num_joints, num_joints))
    for child, parent in enumerate(_PARENTS[num_joints]):
        if parent >= 0:
            adjacency[child, parent] = 1.0
            adjacency[parent, child] = 1.0
    for joint in range(num_joints):
        adjacency[joint] = adjacency[joint] / adjacency[joint].sum()
    for joint in range(num_joints):
        adjacency[joint, joint] = 1.0
    return adjacency


def released_forward(
    state: Mapping[str, np.ndarray], x_t: ArrayLike, cond: ArrayLike, timestep: ArrayLike
) -> np.ndarray:
    """Run the released network in evaluation mode.

    Args:
        state: Tensors under the released key names, without prefix. Keys that the forward pass does not need (the
            schedule, ``block3``) may be missing.
        x_t: Noisy poses ``[B, J, 3]``.
        cond: Normalised 2D keypoints ``[B, J, 2]``.
        timestep: Timesteps ``[B]``, integers from 0.

    Returns:
        ``[B, J, 5]`` float64: the noise estimate in channels 0 to 2, the rebuilt condition in channels 3 and 4.
    """
    net = {
        key.removeprefix("denoise_fn."): np.asarray(value, dtype=np.float64)
        for key, value in state.items()
        if key.startswith("denoise_fn.")
    }
    x_t = np.asarray(x_t, dtype=np.float64)
    cond = np.asarray(cond, dtype=np.float64)
    adjacency = released_adjacency(x_t.shape[1])
    time = _time_embedding(net, np.asarray(timestep, dtype=np.float64))

    x = np.concatenate([x_t, cond], axis=-1)
    x = _graph_block(net, "gconv_input.0", x, adjacency)
    for layer in range(4):
        inner = _graph_block(net, f"gconv_layers.{layer}.gconv1", x, adjacency)
        x = x + _graph_block(net, f"gconv_layers.{layer}.gconv2", inner, adjacency)
    x = _time_block(net, "block1", x, time)
    x = _non_local(net, "non_local", x)
    x = _time_block(net, "block2", x, time)
    return _graph_conv(net, "gconv_output", x, adjacency)


def _graph_conv(net: Mapping[str, np.ndarray], name: str, x: np.ndarray, adjacency: np.ndarray) -> np.ndarray:
    weight, mask, offset, bias = (net[f"{name}.{part}"] for part in ("W", "M", "adj2", "bias"))
    mixing = adjacency + offset
    mixing = (mixing + mixing.T) / 2.0
    own = np.einsum("bjc,co->bjo", x, weight[0])
    other = np.einsum("bjc,co->bjo", x, weight[1])
    out = np.zeros_like(own)
    num_joints = x.shape[1]
    for target in range(num_joints):
        for source in range(num_joints):
            features = own if source == target else other
            out[:, target] += mixing[target, source] * mask[source] * features[:, source]
    return out + bias


def _batch_norm(net: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Normalise the last axis, the channels, with the running statistics."""
    centred = x - net[f"{name}.running_mean"]
    scaled = centred / np.sqrt(net[f"{name}.running_var"] + _BATCH_NORM_EPS)
    return scaled * net[f"{name}.weight"] + net[f"{name}.bias"]


def _graph_block(net: Mapping[str, np.ndarray], name: str, x: np.ndarray, adjacency: np.ndarray) -> np.ndarray:
    x = _graph_conv(net, f"{name}.gconv", x, adjacency)
    return np.maximum(_batch_norm(net, f"{name}.bn", x), 0.0)


def _linear(net: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("bi,oi->bo", x, net[f"{name}.weight"]) + net[f"{name}.bias"]


def _silu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))


def _sinusoids(timestep: np.ndarray, size: int) -> np.ndarray:
    """Embed ``[B]`` timesteps as ``[B, size]``: all sines, then all cosines."""
    half = size // 2
    embedding = np.zeros((timestep.shape[0], size))
    for index in range(half):
        frequency = math.exp(-math.log(1e4) * index / (half - 1))
        embedding[:, index] = np.sin(timestep * frequency)
        embedding[:, half + index] = np.cos(timestep * frequency)
    return embedding


def _time_embedding(net: Mapping[str, np.ndarray], timestep: np.ndarray) -> np.ndarray:
    embedding = _sinusoids(timestep, net["time_mlp.1.weight"].shape[1])
    return _linear(net, "time_mlp.3", _gelu(_linear(net, "time_mlp.1", embedding)))


def _time_block(net: Mapping[str, np.ndarray], name: str, x: np.ndarray, time: np.ndarray) -> np.ndarray:
    modulation = _linear(net, f"{name}.mlp.1", _silu(time))
    channels = x.shape[-1]
    scale, shift = modulation[:, None, :channels], modulation[:, None, channels:]
    return _silu(x * (1.0 + scale) + shift)


def _conv1x1(net: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return np.einsum("bji,oi->bjo", x, net[f"{name}.weight"][:, :, 0, 0]) + net[f"{name}.bias"]


def _non_local(net: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    theta = _conv1x1(net, f"{name}.theta", x)
    phi = _conv1x1(net, f"{name}.phi", x)
    values = _conv1x1(net, f"{name}.g", x)
    logits = np.einsum("bqc,bkc->bqk", theta, phi)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    attended = np.einsum("bqk,bkc->bqc", weights, values)
    return _batch_norm(net, f"{name}.W.1", _conv1x1(net, f"{name}.W.0", attended)) + x
