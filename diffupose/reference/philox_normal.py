"""Gaussian noise by counter in plain PyTorch: Philox 4x32-10 and the Box-Muller transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INITIAL_NOISE_STEP = 0xFFFF
"""The ``step`` of the initial noise of a reverse process; its steps count from 0."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Bounds the int64 temporaries to a few dozen megabytes.
_MAX_BLOCKS_AT_ONCE = 1 << 17


def _multiply(multiplier: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of 32-bit numbers, from half products that fit int64."""
    low = words * (multiplier & 0xFFFF)  # < 2^48
    high = words * (multiplier >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32_10(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return the four random words of each counter: ten rounds of Philox 4x32.

    Args:
        counter: Words of shape ``[..., 4]``, int64, each in [0, 2^32).
        key: Two words in [0, 2^32).

    Returns:
        Words of shape ``[..., 4]``, int64, each in [0, 2^32).

    Example:
        >>> words = philox_4x32_10(torch.zeros(4, dtype=torch.int64), (0, 0))
        >>> [f"{word:08x}" for word in words.tolist()]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _box_muller(words: Tensor) -> Tensor:
    """Return ``sqrt(-2 ln u1) (cos, sin)(2 pi u2)`` of word pairs ``[..., 2]``, in float32."""
    n1, n2 = (words >> 8).unbind(-1)
    u1 = (n1 + 1).to(torch.float32) * 2.0**-24  # (0, 1]
    u2 = n2.to(torch.float32) * 2.0**-24  # [0, 1)
    # The angle is `quarter` quarter turns plus f of one, |f| <= 1/2: exact, and cos and sin are most accurate there.
    quarter = torch.floor(4.0 * u2 + 0.5)
    f = 4.0 * u2 - quarter
    c, s = torch.cos(f * (math.pi / 2)), torch.sin(f * (math.pi / 2))
    odd = quarter.remainder(2) == 1
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    cos = torch.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = torch.where((quarter == 2) | (quarter == 3), -sin, sin)
    return torch.sqrt(-2.0 * torch.log(u1)).unsqueeze(-1) * torch.stack((cos, sin), dim=-1)


def philox_normal(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    """Return standard normal noise that depends only on seed, frame, hypothesis, step and element.

        key     = (seed & 0xffffffff, seed >> 32)
        counter = (frame & 0xffffffff, frame >> 32, hypothesis, step << 16 | block),  block = element // 4
        words (w0, w1) -> z0, z1 and (w2, w3) -> z2, z3:
        u1 = ((w >> 8) + 1) / 2^24,  u2 = (w' >> 8) / 2^24,  z = sqrt(-2 ln u1) (cos, sin)(2 pi u2)

    Arguments and result are those of :func:`diffupose.ops.philox_normal`, which also checks them.
    """
    device = frame_ids.device
    key = (seed & _MASK, (seed >> 32) & _MASK)
    num_blocks = (num_elements + 3) // 4
    last = (step << 16) | torch.arange(num_blocks, device=device)
    blocks_per_frame = max(1, len(hypothesis_ids) * num_blocks)
    shape = (len(frame_ids), len(hypothesis_ids), num_elements)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    chunk = max(1, _MAX_BLOCKS_AT_ONCE // blocks_per_frame)
    for ids, noise in zip(frame_ids.split(chunk), out.split(chunk), strict=True):
        frames = ids[:, None, None]
        # Ids are unsigned, so the mask removes the sign bits that the shift of a negative id copies.
        words = (frames & _MASK, (frames >> 32) & _MASK, hypothesis_ids[:, None] & _MASK, last)
        counter = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [B, H, num_blocks, 4]
        normals = _box_muller(philox_4x32_10(counter, key).unflatten(-1, (2, 2)))  # [B, H, num_blocks, 2, 2]
        noise.copy_(normals.flatten(2)[..., :num_elements])
    return out
