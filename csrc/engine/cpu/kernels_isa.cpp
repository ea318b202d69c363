#include <cstdint>

#include "common/row_blocks.h"
#include "common/vec_math.h"
#include "engine/cpu/kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace diffupose {
namespace DIFFUPOSE_ISA {
namespace {

constexpr int kPanel = 2 * kLanes;
// Accumulators, two vectors of columns and a broadcast fill the registers: 32, elsewhere 16.
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

// The left operand as a product takes it.
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

// --- Layers ---------------------------------------------------------------------------------------------------------

template <Activation kActivation>
Vec activate(Vec x) {
    if constexpr (kActivation == Activation::relu) return max(x, Vec{});
    if constexpr (kActivation == Activation::gelu) return gelu(x);
    return x;
}

// Unsharing, both adjacency products, bias, activation and residual of one pose and one panel of columns.
template <Activation kActivation>
struct Unshare {
    const GraphConvArgs& args;
    const float* hidden;  // [J, own | neighbours], the neighbours' half already modulated
    int64_t pose, column;
    template <int kRows>
    void run(int64_t joint) const {
        const int64_t joints = args.rows.joints;
        Vec sum[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const int64_t j = joint + r;
            sum[r] = load(args.own + j * args.y_stride + column) * load(hidden + j * kPanel) + load(args.bias + column);
        }
        for (int64_t i = 0; i < joints; ++i) {
            const Vec neighbor = load(hidden + i * kPanel + kLanes);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) sum[r] += args.adjacency[(joint + r) * joints + i] * neighbor;
        }
        const int64_t offset = (pose * joints + joint) * args.y_stride + column;
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            Vec value = activate<kActivation>(sum[r]);
            if (args.residual != nullptr) value += load(args.residual + offset + r * args.y_stride);
            store(args.y + offset + r * args.y_stride, value);
        }
    }
};

template <Activation kActivation>
void graph_conv_with(const GraphConvArgs& args, bool bfloat16, Part part, void* scratch) {
    const int64_t rows = count_of(args.rows), joints = args.rows.joints;
    auto* hidden = static_cast<float*>(scratch);  // [rows, own | neighbours]
    const Operand a = operand(args.x, args.x_stride, rows, args.weight.k, bfloat16, hidden + rows * kPanel);
    const Range range = share(args.weight.num_panels, part);
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
        product(args.weight, panel, a, rows, bfloat16, hidden);
        const int64_t column = panel * kLanes;
        for (int64_t pose = 0; pose < args.rows.poses; ++pose) {
            float* mine = hidden + pose * joints * kPanel;
            for (int64_t j = 0; j < joints; ++j) {
                float* right = mine + j * kPanel + kLanes;
                store(right, load(right) * load(args.neighbors + j * args.y_stride + column));
            }
            in_blocks<kMaxBlock>(joints, Unshare<kActivation>{args, mine, pose, column});
        }
    }
}

void graph_conv(const GraphConvArgs& args, bool bfloat16, Part part, void* scratch) {
    switch (args.activation) {
        case Activation::relu:
            return graph_conv_with<Activation::relu>(args, bfloat16, part, scratch);
        case Activation::gelu:
            return graph_conv_with<Activation::gelu>(args, bfloat16, part, scratch);
        default:
            return graph_conv_with<Activation::none>(args, bfloat16, part, scratch);
    }
}

void linear(const LinearArgs& args, bool bfloat16, Part part, void* scratch) {
    const int64_t rows = count_of(args.rows);
    auto* out = static_cast<float*>(scratch);
    const Operand a = operand(args.x, args.x_stride, rows, args.weight.k, bfloat16, out + rows * kPanel);
    const Range range = share(args.weight.num_panels, part);
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
        product(args.weight, panel, a, rows, bfloat16, out);
        for (int64_t row = 0; row < rows; ++row) {
            const float* bias = args.bias + row % args.rows.joints * args.bias_stride;
            for (int half = 0; half < 2; ++half) {
                const int64_t column = panel * kPanel + half * kLanes, offset = row * args.y_stride + column;
                Vec value = load(out + row * kPanel + half * kLanes) + load(bias + column);
                if (args.residual != nullptr) value += load(args.residual + offset);
                store(args.y + offset, value);
            }
        }
    }
}

void scale_shift(const ScaleShiftArgs& args, Part part) {
    const Range range = share(count_of(args.rows), part);
    const int64_t full = args.channels / kLanes * kLanes;
    const IntVec rest = first_lanes(static_cast<int>(args.channels - full));
    const int64_t end = round_up(args.channels, kLanes);
    for (int64_t row = range.begin; row < range.end; ++row) {
        const float* x = args.x + row * args.stride;
        float* y = args.y + row * args.stride;
        if (!args.normalize) {
            for (int64_t i = 0; i < end; i += kLanes) {
                store(y + i, silu(load(x + i) * load(args.scale + i) + load(args.shift + i)));
            }
            continue;
        }
        const auto masked = [&](int64_t i, Vec value) { return i < full ? value : select(rest, value, Vec{}); };
        Vec total = {};
        for (int64_t i = 0; i < end; i += kLanes) total += masked(i, load(x + i));
        const float mean = sum(total) / static_cast<float>(args.channels);
        Vec squares = {};
        for (int64_t i = 0; i < end; i += kLanes) {
            const Vec centered = masked(i, load(x + i) - mean);
            squares += centered * centered;
        }
        const float variance = sum(squares) / static_cast<float>(args.channels);
        const float factor = 1.0f / __builtin_sqrtf(variance + args.eps);
        for (int64_t i = 0; i < end; i += kLanes) {
            store(y + i, (load(x + i) - mean) * factor * load(args.scale + i) + load(args.shift + i));
        }
    }
}

// c[row] = sum over i of a[row, i] b[i], one vector of columns.
struct SmallProduct {
    const float* a;
    int64_t a_row, a_column, k;  // strides of a
    const float* b;
    int64_t b_stride;
    float* c;
    int64_t c_stride;
    int64_t lanes;  // that are stored, at most kLanes
    template <int kRows>
    void run(int64_t row) const {
        Vec sum[kRows] = {};
        for (int64_t i = 0; i < k; ++i) {
            const Vec right = load(b + i * b_stride);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) sum[r] += a[(row + r) * a_row + i * a_column] * right;
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            float* out = c + (row + r) * c_stride;
            if (lanes >= kLanes) {
                store(out, sum[r]);
            } else {
                __builtin_memcpy(out, &sum[r], static_cast<size_t>(lanes) * 4);
            }
        }
    }
};

// Softmax of every column of `scores` [count, stride], a vector of columns at a time.
void softmax_of_columns(float* scores, int64_t count, int64_t stride) {
    Vec highest = load(scores);
    for (int64_t i = 1; i < count; ++i) highest = max(load(scores + i * stride), highest);
    Vec total = {};
    for (int64_t i = 0; i < count; ++i) {
        const Vec value = exp(load(scores + i * stride) - highest);
        store(scores + i * stride, value);
        total += value;
    }
    const Vec factor = 1.0f / total;
    for (int64_t i = 0; i < count; ++i) store(scores + i * stride, load(scores + i * stride) * factor);
}

// Queries lie side by side in a vector's lanes, so that the softmax over keys needs no sum across lanes.
void attention(const AttentionArgs& args, Part part, void* scratch) {
    const int64_t joints = args.rows.joints, channels = args.channels, width = args.num_heads * channels;
    const int64_t padded = round_up(joints, kLanes);
    auto* queries = static_cast<float*>(scratch);  // [channels, J padded]
    float* scores = queries + channels * padded;   // [keys, queries padded]
    for (int64_t i = 0; i < channels * padded; ++i) queries[i] = 0.0f;
    const Range range = share(args.rows.poses * args.num_heads, part);
    for (int64_t index = range.begin; index < range.end; ++index) {
        const int64_t pose = index / args.num_heads, head = index % args.num_heads;
        const float* query = args.x + pose * joints * args.x_stride + head * channels;
        const float *key = query + width, *value = query + 2 * width;
        for (int64_t j = 0; j < joints; ++j) {
            for (int64_t c = 0; c < channels; ++c) queries[c * padded + j] = query[j * args.x_stride + c];
        }
        for (int64_t j = 0; j < padded; j += kLanes) {
            in_blocks<kMaxBlock>(
                joints, SmallProduct{key, args.x_stride, 1, channels, queries + j, padded, scores + j, padded, kLanes});
            softmax_of_columns(scores + j, joints, padded);
        }
        float* y = args.y + pose * joints * args.y_stride + head * channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
            in_blocks<kMaxBlock>(joints, SmallProduct{scores, 1, padded, joints, value + c, args.x_stride, y + c,
                                                      args.y_stride, channels - c});
        }
    }
}

int64_t scratch_bytes(Rows rows, int64_t largest_k, int64_t largest_head) {
    const int64_t product = count_of(rows) * (kPanel + round_up(largest_k, 2)) * 4;
    const int64_t attention = (largest_head + rows.joints) * round_up(rows.joints, kLanes) * 4;
    return (product > attention ? product : attention) + 64;
}

double peak_loop(int64_t iterations, bool bfloat16, float* total) {
    constexpr int kSums = kMaxBlock * 2;
#ifdef __AVX512BF16__
    if (bfloat16) {
        __m512 sums[kSums];
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
        const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
        for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], pair, pair);
        }
        for (int i = 0; i < kSums; ++i) *total += sum(reinterpret_cast<Vec>(sums[i]));
        return 4.0 * kLanes * kSums * static_cast<double>(iterations);
    }
#else
    (void)bfloat16;
#endif
    Vec sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = splat(static_cast<float>(i));
    const Vec factor = splat(0.999f), addend = splat(1e-3f);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + addend;
    }
    for (int i = 0; i < kSums; ++i) *total += sum(sums[i]);
    return 2.0 * kLanes * kSums * static_cast<double>(iterations);
}

}  // namespace

extern const Kernels kKernels = {
    kLanes, kBfloat16, packed_bytes, pack, scratch_bytes, graph_conv, linear, scale_shift, attention, peak_loop,
};

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
