"""Noise by counter inside kernels: Philox 4x32-10 and the Box-Muller transform of its words.

The same formulas stand in ``diffupose/reference/philox_normal.py`` and ``csrc/common/philox.h``.
"""

import triton
import triton.language as tl


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Return four random words per counter: ten rounds of the bijection that the key selects; all are uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(word1, word2):
    """Return two normals per pair of words: sqrt(-2 ln u1) (cos, sin)(2 pi u2), within 1e-6 of float64."""
    # The angle is `quarter` quarter turns plus f of one, |f| <= 1/2; integers keep the reduction exact.
    n2 = (word2 >> 8).to(tl.int32)  # u2 = n2 / 2^24
    quarter = (n2 + (1 << 21)) >> 22  # floor(4 u2 + 1/2), 0 to 4
    f = (n2 - quarter * (1 << 22)).to(tl.float32) * (2.0**-22)
    # Taylor's polynomials: for angles up to a quarter of pi the first terms left out are below 2e-9. The hardware's
    # own functions are not exact enough, and those that are bring a reduction of large angles with them.
    x = f * 1.5707963267948966
    y = x * x
    c = ((((-1.0 / 3628800 * y + 1.0 / 40320) * y - 1.0 / 720) * y + 1.0 / 24) * y - 0.5) * y + 1.0
    s = (((1.0 / 362880 * y - 1.0 / 5040) * y + 1.0 / 120) * y - 1.0 / 6) * (y * x) + x
    radius = tl.sqrt_rn(-2.0 * tl.log(((word1 >> 8) + 1).to(tl.float32) * (2.0**-24)))
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)  # quarters 1 and 2
    sin = tl.where((quarter & 2) != 0, -sin, sin)  # quarters 2 and 3
    return radius * cos, radius * sin


@triton.jit
def philox_normal_blocks(seed, frame_ids, hypothesis_ids, step, blocks):
    """Return the four normals of each block of elements, one axis more than ``blocks``, whose last axis is 1.

    Args:
        seed: int64.
        frame_ids: int64, as are the others; read as unsigned.
        hypothesis_ids: The low 32 bits count.
        step: Row of the step table.
        blocks: Which four elements, int32.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = frame_ids.to(tl.uint32), (frame_ids >> 32).to(tl.uint32), hypothesis_ids.to(tl.uint32)
    c3 = ((step << 16) | blocks).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32_10(c0, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    # Joined from within: [.., 2, 2] with pairs as rows.
    pairs = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(pairs, (blocks.shape[0], 4))
