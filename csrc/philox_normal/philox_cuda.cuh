// Noise by counter in CUDA code: the words of philox.h, and its transform in fewer instructions.
#pragma once

#include <cmath>
#include <cstring>

#include "common/cuda.h"
#include "philox_normal/philox.h"

namespace diffupose {

// 1 / sqrt(x) for x > 0, in one instruction, with an error in the last bit or two.
__device__ __forceinline__ float nearly_inverse_root(float x) {
#ifdef __CUDACC__
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / std::sqrt(x);
#endif
}

// sqrt(-2 ln u) for u = (word / 2^8 + 1) / 2^24, word / 2^8 rounded down; within 4e-7 of float64, and 0 for u = 1.
// CUDA's own logarithm and root also handle numbers that do not occur here, and its root has a branch.
__device__ __forceinline__ float radius_cuda(uint32_t word) {
    // u = 2^exponent (1 + f) with -1/3 <= f <= 1/3. The polynomial has the least relative error, 3e-8.
    const float number = static_cast<float>((word >> 8) + 1);
    int32_t bits;
    memcpy(&bits, &number, 4);
    const int32_t shifted = (bits - 0x3f2aaaab) & ~0x7fffff, rest = bits - shifted;  // 2^23 times that of `number`
    const float exponent = fmaf(static_cast<float>(shifted), 0x1p-23f, -24.0f);
    float f;
    memcpy(&f, &rest, 4);
    f -= 1.0f;
    float p = fmaf(f, 0.14017170667648315f, -0.15390419960021973f);
    p = fmaf(p, f, 0.13997893035411835f), p = fmaf(p, f, -0.164155513048172f);
    p = fmaf(p, f, 0.20011021196842194f), p = fmaf(p, f, -0.2500784695148468f);
    p = fmaf(p, f, 0.33333200216293335f), p = fmaf(p, f, -0.49999934434890747f);
    const float square = -2.0f * fmaf(exponent, 0.693147180559945f, fmaf(p, f * f, f));
    // One Newton step after the hardware's root.
    const float inverse = nearly_inverse_root(square < 1e-30f ? 1e-30f : square), root = square * inverse;
    return fmaf(fmaf(-root, root, square), 0.5f * inverse, root);
}

// box_muller of philox.h, within the same 1e-6 of float64. Sine and cosine are Taylor polynomials in quarter turns; up
// to half a quarter turn, the first omitted terms are below 4e-9. CUDA's own functions are as accurate, but each
// reduces the angle again. The quadrant is chosen without a branch, since the threads of a warp have all four.
__device__ __forceinline__ void box_muller_cuda(uint32_t word1, uint32_t word2, float* z) {
    constexpr float kHalfPi = 1.57079632679489662f, kRestOfHalfPi = -4.371139e-8f;
    const int32_t n2 = static_cast<int32_t>(word2 >> 8);  // u2 = n2 / 2^24
    const int32_t quarter = (n2 + (1 << 21)) >> 22;       // floor(4 u2 + 1/2), 0 to 4
    const float f = static_cast<float>(n2 - quarter * (1 << 22)) * 0x1p-22f, g = f * f;
    const float c =
        ((((-2.52020424e-5f * g + 9.19260275e-4f) * g - 0.0208634808f) * g + 0.253669508f) * g - 1.23370055f) * g +
        1.0f;
    const float small =
        (((1.60441185e-4f * g - 0.00468175414f) * g + 0.0796926262f) * g - 0.645964098f) * g + kRestOfHalfPi;
    const float s = fmaf(f, kHalfPi, f * small);
    const float radius = radius_cuda(word1);
    const bool odd = quarter % 2 != 0;
    z[0] = ((quarter + 1) & 2 ? -radius : radius) * (odd ? s : c);  // negative in quarters 1 and 2
    z[1] = (quarter & 2 ? -radius : radius) * (odd ? c : s);        // in quarters 2 and 3
}

// philox_normal_block of philox.h.
__device__ __forceinline__ void philox_normal_block_cuda(PhiloxKey key, uint64_t frame_id, uint32_t hypothesis_id,
                                                         uint32_t step, uint32_t block, float* z) {
    const PhiloxWords words = philox_block(key, frame_id, hypothesis_id, step, block);
    box_muller_cuda(words.w0, words.w1, z);
    box_muller_cuda(words.w2, words.w3, z + 2);
}

}  // namespace diffupose
