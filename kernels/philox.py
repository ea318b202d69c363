"""Noise by counter inside kernels: Philox 4x32-10 and the Box-Muller transform of its words.

The formulas are those of ``diffupose/reference/philox_normal.py`` and ``csrc/philox_normal/philox.h``. The CUDA code
has the same polynomials, in ``csrc/philox_normal/philox_cuda.cuh``.
"""

import triton
import triton.language as tl


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Return four random words per counter after ten rounds with the key; all are uint32."""
    for _ in tl.static_range(10):
        # A 64-bit product is one instruction for both halves.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    """Return sqrt(-2 ln u) of u = (floor(word / 2^8) + 1) / 2^24, within 4e-7 of float64; it is 0 where u is 1."""
    # u is 2^exponent (1 + f) with f from -1/3 to 1/3. The polynomial has the least relative error, 3e-8.
    number = ((word >> 8) + 1).to(tl.float32)
    bits = number.to(tl.int32, bitcast=True)
    shifted = (bits - 0x3F2AAAAB) & -0x800000  # 2^23 times the exponent of `number`
    exponent = tl.fma(shifted.to(tl.float32), 2.0**-23, -24.0)
    f = (bits - shifted).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.14017170667648315, -0.15390419960021973)
    p = tl.fma(p, f, 0.13997893035411835)
    p = tl.fma(p, f, -0.164155513048172)
    p = tl.fma(p, f, 0.20011021196842194)
    p = tl.fma(p, f, -0.2500784695148468)
    p = tl.fma(p, f, 0.33333200216293335)
    p = tl.fma(p, f, -0.49999934434890747)
    square = -2.0 * tl.fma(exponent, 0.6931471805599453, tl.fma(p, f * f, f))
    # One step of Newton's behind the hardware's inexact root; a root that is exact has branches.
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    root = square * inverse
    return tl.fma(tl.fma(-root, root, square), 0.5 * inverse, root)


@triton.jit
def box_muller(word1, word2):
    """Return two normals per pair of words: sqrt(-2 ln u1) (cos, sin)(2 pi u2), within 1e-6 of float64."""
    # The angle is `quarter` quarter turns plus f of one, |f| <= 1/2; integers keep the reduction exact.
    n2 = (word2 >> 8).to(tl.int32)  # u2 = n2 / 2^24
    quarter = (n2 + (1 << 21)) >> 22  # floor(4 u2 + 1/2), 0 to 4
    f = (n2 - quarter * (1 << 22)).to(tl.float32) * (2.0**-22)
    # Taylor polynomials of a quarter turn: at half of one, the first omitted terms are below 4e-9. The hardware's own
    # functions are not exact enough, and the library's also reduce large angles.
    g = f * f
    c = tl.fma(g, -2.52020424e-5, 9.19260275e-4)
    c = tl.fma(c, g, -0.0208634808)
    c = tl.fma(c, g, 0.253669508)
    c = tl.fma(c, g, -1.23370055)
    c = tl.fma(c, g, 1.0)
    s = tl.fma(g, 1.60441185e-4, -0.00468175414)
    s = tl.fma(s, g, 0.0796926262)
    s = tl.fma(s, g, -0.645964098)
    s = tl.fma(s, g, -4.371139e-8)  # the part of pi / 2 that float32 leaves out
    s = tl.fma(f, 1.5707963267948966, f * s)
    radius = _radius(word1)
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    # The cosine is negative in quarters 1 and 2, the sine in 2 and 3.
    cos = tl.where(((quarter + 1) & 2) != 0, -radius, radius) * cos
    sin = tl.where((quarter & 2) != 0, -radius, radius) * sin
    return cos, sin


@triton.jit
def philox_normal_blocks(seed, frame_ids, hypothesis_ids, step, blocks):
    """Return the four normals of each block of elements, one axis more than ``blocks``, whose last axis is 1.

    Args:
        seed: int64.
        frame_ids: int64, as are the next two; read as unsigned.
        hypothesis_ids: Only the low 32 bits are used.
        step: Row of the step table.
        blocks: Index of the four elements, int32.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = frame_ids.to(tl.uint32), (frame_ids >> 32).to(tl.uint32), hypothesis_ids.to(tl.uint32)
    c3 = ((step << 16) | blocks).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32_10(c0, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    # tl.join adds the last axis: [.., 2, 2] with pairs as rows.
    pairs = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(pairs, (blocks.shape[0], 4))
