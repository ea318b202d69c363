"""Noise by counter in Python integers and float64, written from its definition."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def philox_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's unbounded integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right % 2**32, (left >> 32) ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def float64_normals(seed: int, frame_ids: Tensor, hypothesis_ids: Tensor, step: int, num_elements: int) -> Tensor:
    """The definition, element by element, in Python integers and float64."""
    seed %= 2**64
    out = np.zeros((len(frame_ids), len(hypothesis_ids), num_elements))
    for b, h, e in np.ndindex(out.shape):
        frame, hypothesis = int(frame_ids[b]) % 2**64, int(hypothesis_ids[h])
        counter = [frame % 2**32, frame >> 32, hypothesis, step << 16 | e // 4]
        words = philox_python(counter, [seed % 2**32, seed >> 32])
        word1, word2 = words[:2] if e % 4 < 2 else words[2:]
        radius = math.sqrt(-2 * math.log(((word1 >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (word2 >> 8) / 2**24
        out[b, h, e] = radius * (math.cos(angle) if e % 2 == 0 else math.sin(angle))
    return torch.from_numpy(out)
