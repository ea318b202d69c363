#include <cstdint>

#include "common/vec_math.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/products.h"

namespace diffupose {
namespace DIFFUPOSE_ISA {
namespace {

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

// c[row] = sum over i of a[row, i] b[i], for one vector of columns.
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

// The lanes of a vector are queries, so that the softmax over keys needs no sum across lanes.
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
