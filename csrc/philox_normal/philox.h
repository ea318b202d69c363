// Noise by counter: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the
// Box-Muller transform of its words. The same formula stands in diffupose/reference/philox_normal.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace diffupose {

struct PhiloxKey {
    uint32_t k0, k1;
};

struct PhiloxWords {
    uint32_t w0, w1, w2, w3;
};

// Ten rounds of the bijection of counters that the key selects.
DIFFUPOSE_HOST_DEVICE inline PhiloxWords philox_4x32_10(PhiloxWords words, PhiloxKey key) {
    constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = kMultiplier0 * words.w0;
        const uint64_t product1 = kMultiplier1 * words.w2;
        words = {static_cast<uint32_t>(product1 >> 32) ^ words.w1 ^ key.k0, static_cast<uint32_t>(product1),
                 static_cast<uint32_t>(product0 >> 32) ^ words.w3 ^ key.k1, static_cast<uint32_t>(product0)};
        key = {key.k0 + kWeyl0, key.k1 + kWeyl1};
    }
    return words;
}

// Two normals from two words: z = sqrt(-2 ln u1) (cos, sin)(2 pi u2), u1 in (0, 1], u2 in [0, 1), within 1e-6 of the
// same transform in float64. CUDA code has its own: philox_cuda.cuh.
inline void box_muller(uint32_t word1, uint32_t word2, float* z) {
    constexpr float kHalfPi = 1.57079632679489662f;
    const float u1 = static_cast<float>((word1 >> 8) + 1) * 0x1p-24f;
    // The angle is `quarter` quarter turns plus f of one, |f| <= 1/2; integers keep the reduction exact.
    const int32_t n2 = static_cast<int32_t>(word2 >> 8);  // u2 = n2 / 2^24
    const int32_t quarter = (n2 + (1 << 21)) >> 22;       // floor(4 u2 + 1/2), 0 to 4
    const float f = static_cast<float>(n2 - quarter * (1 << 22)) * 0x1p-22f;
    const float radius = std::sqrt(-2.0f * std::log(u1));
    const float c = radius * std::cos(f * kHalfPi), s = radius * std::sin(f * kHalfPi);
    switch (quarter & 3) {
        case 0:
            z[0] = c, z[1] = s;
            break;
        case 1:
            z[0] = -s, z[1] = c;
            break;
        case 2:
            z[0] = -c, z[1] = -s;
            break;
        default:
            z[0] = s, z[1] = -c;
            break;
    }
}

// The random words of one block of four elements of one hypothesis of one frame.
DIFFUPOSE_HOST_DEVICE inline PhiloxWords philox_block(PhiloxKey key, uint64_t frame_id, uint32_t hypothesis_id,
                                                      uint32_t step, uint32_t block) {
    return philox_4x32_10(
        {static_cast<uint32_t>(frame_id), static_cast<uint32_t>(frame_id >> 32), hypothesis_id, step << 16 | block},
        key);
}

// Its four normals.
inline void philox_normal_block(PhiloxKey key, uint64_t frame_id, uint32_t hypothesis_id, uint32_t step, uint32_t block,
                                float* z) {
    const PhiloxWords words = philox_block(key, frame_id, hypothesis_id, step, block);
    box_muller(words.w0, words.w1, z);
    box_muller(words.w2, words.w3, z + 2);
}

}  // namespace diffupose
