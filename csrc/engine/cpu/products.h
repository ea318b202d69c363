// Products of a tile's rows and a packed weight, and the packing, for one instruction set.
#pragma once

#include <cstdint>

#include "common/row_blocks.h"
#include "common/vec.h"
#include "engine/cpu/kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace diffupose {
namespace DIFFUPOSE_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;
// Rows of a block: its sums, two vectors of columns and a broadcast fill the registers, 32 with AVX-512 and else 16.
#ifdef __AVX512F__
constexpr int kMaxBlock = 12;
#else
constexpr int kMaxBlock = 6;
#endif
#ifdef __AVX512BF16__
constexpr bool kBfloat16 = true;
#else
constexpr bool kBfloat16 = false;
#endif

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t count_of(Rows rows) { return rows.poses * rows.joints; }

struct Range {
    int64_t begin, end;
};

Range share(int64_t count, Part part) {
    return {count * part.index / part.count, count * (part.index + 1) / part.count};
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
uint16_t to_bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float through_bfloat16(float value) {
    const uint32_t bits = static_cast<uint32_t>(to_bfloat16(value)) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// --- Products: rows x K times a panel, every element one chain of multiply-adds in the order of K. ------------------

template <int kRows>
void float_block(const float* a, int64_t stride, int64_t k, const float* b, float* c) {
    Vec sum[kRows][2] = {};
    for (int64_t i = 0; i < k; ++i, b += kPanel) {
        const Vec left = load(b), right = load(b + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            sum[r][0] += a[r * stride + i] * left;
            sum[r][1] += a[r * stride + i] * right;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        store(c + r * kPanel, sum[r][0]);
        store(c + r * kPanel + kLanes, sum[r][1]);
    }
}

#ifdef __AVX512BF16__
template <int kRows>
void bfloat16_block(const uint32_t* a, int64_t stride, int64_t pairs, const uint32_t* b, float* c) {
    __m512 sum[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; ++i, b += kPanel) {
        const __m512bh left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
        const __m512bh right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kLanes));
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r * stride + i])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], pair, left);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], pair, right);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * kPanel, sum[r][0]);
        _mm512_storeu_ps(c + r * kPanel + kLanes, sum[r][1]);
    }
}
#endif

struct FloatProduct {
    const float* a;
    int64_t stride, k;
    const float* panel;
    float* c;
    template <int kRows>
    void run(int64_t row) const {
        float_block<kRows>(a + row * stride, stride, k, panel, c + row * kPanel);
    }
};

#ifdef __AVX512BF16__
struct Bfloat16Product {
    const uint32_t* a;
    int64_t pairs;
    const uint32_t* panel;
    float* c;
    template <int kRows>
    void run(int64_t row) const {
        bfloat16_block<kRows>(a + row * pairs, pairs, pairs, panel, c + row * kPanel);
    }
};
#endif

// The left operand of a product.
struct Operand {
    const void* data;
    int64_t stride;  // in float32, or in pairs of bfloat16
};

Operand operand(const float* x, int64_t stride, int64_t rows, int64_t k, bool bfloat16, void* scratch) {
    if (!bfloat16) return {x, stride};
    if constexpr (kBfloat16) {
#ifdef __AVX512BF16__
        const int64_t pairs = (k + 1) / 2;
        auto* out = static_cast<uint16_t*>(scratch);
        for (int64_t r = 0; r < rows; ++r) {
            uint16_t* row = out + r * 2 * pairs;
            int64_t i = 0;
            for (; i + 16 <= k; i += 16) {
                const __m256bh values = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + r * stride + i));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), reinterpret_cast<__m256i>(values));
            }
            for (; i < k; ++i) row[i] = to_bfloat16(x[r * stride + i]);
            if (k % 2) row[k] = 0;
        }
        return {out, pairs};
#endif
    } else {
        auto* out = static_cast<float*>(scratch);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < k; ++i) out[r * k + i] = through_bfloat16(x[r * stride + i]);
        }
        return {out, k};
    }
}

void product(const PackedWeight& weight, int64_t panel, const Operand& a, int64_t rows, bool bfloat16, float* c) {
#ifdef __AVX512BF16__
    if (bfloat16) {
        const int64_t pairs = (weight.k + 1) / 2;
        const auto* panels = static_cast<const uint32_t*>(weight.panels);
        in_blocks<kMaxBlock>(
            rows, Bfloat16Product{static_cast<const uint32_t*>(a.data), pairs, panels + panel * pairs * kPanel, c});
        return;
    }
#else
    (void)bfloat16;
#endif
    const auto* panels = static_cast<const float*>(weight.panels);
    in_blocks<kMaxBlock>(rows, FloatProduct{static_cast<const float*>(a.data), a.stride, weight.k,
                                            panels + panel * weight.k * kPanel, c});
}

int64_t packed_bytes(int64_t k, int64_t columns, bool bfloat16) {
    const int64_t padded = round_up(columns, kPanel);
    return padded * (bfloat16 && kBfloat16 ? round_up(k, 2) * 2 : k * 4);
}

void pack(const float* weight, int64_t k, int64_t columns, bool interleaved, bool bfloat16, void* panels) {
    const int64_t half = columns / 2;  // C_out of a graph convolution
    const int64_t num_panels = interleaved ? (half + kLanes - 1) / kLanes : (columns + kPanel - 1) / kPanel;
    for (int64_t panel = 0; panel < num_panels; ++panel) {
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            int64_t column = panel * kPanel + lane;
            bool exists = column < columns;
            if (interleaved) {
                const int64_t channel = panel * kLanes + lane % kLanes;
                exists = channel < half;
                column = channel + (lane < kLanes ? 0 : half);
            }
            for (int64_t i = 0; i < round_up(k, 2); ++i) {
                const float value = exists && i < k ? weight[i * columns + column] : 0.0f;
                if (bfloat16 && kBfloat16) {
                    static_cast<uint16_t*>(panels)[((panel * ((k + 1) / 2) + i / 2) * kPanel + lane) * 2 + i % 2] =
                        to_bfloat16(value);
                } else if (i < k) {
                    static_cast<float*>(panels)[(panel * k + i) * kPanel + lane] =
                        bfloat16 ? through_bfloat16(value) : value;
                }
            }
        }
    }
}

}  // namespace
}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
