#include <cstdint>

#include "common/row_blocks.h"
#include "common/vec_storage.h"
#include "modulated_graph_conv/kernels.h"

namespace diffupose {
namespace DIFFUPOSE_ISA {
namespace {

// Accumulators and their operands fill the registers: 32, elsewhere 16.
#ifdef __AVX512F__
constexpr int kMaxBlock = 12, kTile = 4;
#else
constexpr int kMaxBlock = 6, kTile = 3;
#endif

// finish(row, start(row) + sum over i of matrix[row, i] columns[i]), one vector of columns.
template <typename Start, typename Finish>
struct AdjacencyProduct {
    const float* matrix;   // [J, J]
    const float* columns;  // [J, stride]
    int64_t stride, joints;
    const Start& start;
    const Finish& finish;
    template <int kRows>
    void run(int64_t row) const {
        Vec sum[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) sum[r] = start(row + r);
        for (int64_t i = 0; i < joints; ++i) {
            const Vec right = load(columns + i * stride);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) sum[r] += matrix[(row + r) * joints + i] * right;
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) finish(row + r, sum[r]);
    }
};

template <typename Start, typename Finish>
void adjacency_product(const float* matrix, const float* columns, int64_t stride, int64_t joints, const Start& start,
                       const Finish& finish) {
    in_blocks<kMaxBlock>(joints, AdjacencyProduct<Start, Finish>{matrix, columns, stride, joints, start, finish});
}

template <typename Hidden, typename Out>
void forward_of(const GraphConvParameters& parameters, const Hidden* hidden, Out* out, GraphConvSizes sizes,
                PoseRange range, float* scratch) {
    const int64_t joints = sizes.num_joints, channels = sizes.channels, padded = parameters.padded;
    for (int64_t pose = range.begin; pose < range.end; ++pose) {
        const Hidden* own = hidden + pose * joints * 2 * channels;
        Out* y = out + pose * joints * channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t count = channels - c;
            for (int64_t j = 0; j < joints; ++j) {
                const Vec neighbor = load_some(own + (2 * j + 1) * channels + c, count);
                store(scratch + j * kLanes, neighbor * load(parameters.modulation + j * padded + c));
            }
            const Vec bias = load(parameters.bias + c);
            adjacency_product(
                parameters.neighbors, scratch, kLanes, joints,
                [&](int64_t j) {
                    return load_some(own + 2 * j * channels + c, count) * load(parameters.own + j * padded + c) + bias;
                },
                [&](int64_t j, Vec value) { store_some(y + j * channels + c, value, count); });
        }
    }
}

// sums[j, i] += left[j] * right[i] over the columns, kRows x kColumns of them in registers.
template <int kRows, int kColumns>
void outer_tile(const float* left, const float* right, int64_t stride, float* sums, int64_t joints) {
    Vec sum[kRows][kColumns] = {};
    for (int64_t c = 0; c < stride; c += kLanes) {
        Vec a[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) a[r] = load(left + r * stride + c);
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; ++k) {
            const Vec b = load(right + k * stride + c);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r][k] += a[r] * b;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; ++k) {
            float* total = sums + (r * joints + k) * kLanes;
            store(total, load(total) + sum[r][k]);
        }
    }
}

void outer_products(const float* left, const float* right, int64_t stride, int64_t joints, float* sums) {
    const int64_t whole = joints - joints % kTile;
    for (int64_t j = 0; j < joints; j += j < whole ? kTile : 1) {
        for (int64_t i = 0; i < joints; i += i < whole ? kTile : 1) {
            const float *a = left + j * stride, *b = right + i * stride;
            float* total = sums + (j * joints + i) * kLanes;
            if (j < whole && i < whole) {
                outer_tile<kTile, kTile>(a, b, stride, total, joints);
            } else if (j < whole) {
                outer_tile<kTile, 1>(a, b, stride, total, joints);
            } else if (i < whole) {
                outer_tile<1, kTile>(a, b, stride, total, joints);
            } else {
                outer_tile<1, 1>(a, b, stride, total, joints);
            }
        }
    }
}

template <typename Hidden, typename Out>
void backward_of(const GraphConvParameters& parameters, const Out* grad_out, const Hidden* hidden, Hidden* grad_hidden,
                 const GraphConvSums& sums, GraphConvSizes sizes, PoseRange range, float* scratch) {
    const int64_t joints = sizes.num_joints, channels = sizes.channels, padded = parameters.padded;
    float* grad = scratch;                          // [J, C_padded], with zeros behind C_out
    float* modulated = grad + joints * padded;      // [J, C_padded], M neighbor
    float* neighbor = modulated + joints * padded;  // [J, lanes]
    for (int64_t pose = range.begin; pose < range.end; ++pose) {
        const Out* g = grad_out + pose * joints * channels;
        const Hidden* own = hidden + pose * joints * 2 * channels;
        Hidden* grad_own = grad_hidden + pose * joints * 2 * channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t count = channels - c;
            Vec total = load(sums.bias + c);
            for (int64_t j = 0; j < joints; ++j) {
                const int64_t at = j * padded + c, row = 2 * j * channels + c;
                const Vec g_j = load_some(g + j * channels + c, count);
                const Vec right = load_some(own + row + channels, count);
                store(grad + at, g_j);
                store(neighbor + j * kLanes, right);
                store(modulated + at, right * load(parameters.modulation + at));
                store(sums.own + at, load(sums.own + at) + load_some(own + row, count) * g_j);
                store_some(grad_own + row, g_j * load(parameters.own + at), count);
                total += g_j;
            }
            store(sums.bias + c, total);
            adjacency_product(
                parameters.neighbors, grad + c, padded, joints, [](int64_t) { return Vec{}; },
                [&](int64_t i, Vec back) {
                    const int64_t at = i * padded + c;
                    store_some(grad_own + (2 * i + 1) * channels + c, back * load(parameters.modulation + at), count);
                    store(sums.neighbor + at, load(sums.neighbor + at) + load(neighbor + i * kLanes) * back);
                });
        }
        outer_products(grad, modulated, padded, joints, sums.adjacency);
    }
}

// Calls function(Hidden{}, Out{}) with the types of two storages; where hidden is float32, so is out.
template <typename Function>
void with_storages(Storage hidden, Storage out, const Function& function) {
    if (hidden == Storage::float32) {
        function(float{}, float{});
    } else if (out == Storage::float32) {
        function(Bfloat16{}, float{});
    } else {
        function(Bfloat16{}, Bfloat16{});
    }
}

void forward(const GraphConvParameters& parameters, ConstArray hidden, Array out, GraphConvSizes sizes, PoseRange range,
             float* scratch) {
    with_storages(hidden.storage, out.storage, [&](auto of_hidden, auto of_out) {
        forward_of(parameters, static_cast<const decltype(of_hidden)*>(hidden.data),
                   static_cast<decltype(of_out)*>(out.data), sizes, range, scratch);
    });
}

void backward(const GraphConvParameters& parameters, ConstArray grad_out, ConstArray hidden, void* grad_hidden,
              const GraphConvSums& sums, GraphConvSizes sizes, PoseRange range, float* scratch) {
    with_storages(hidden.storage, grad_out.storage, [&](auto of_hidden, auto of_out) {
        using Hidden = decltype(of_hidden);
        backward_of(parameters, static_cast<const decltype(of_out)*>(grad_out.data),
                    static_cast<const Hidden*>(hidden.data), static_cast<Hidden*>(grad_hidden), sums, sizes, range,
                    scratch);
    });
}

}  // namespace

extern const GraphConvKernels kGraphConv;
const GraphConvKernels kGraphConv = {kLanes, forward, backward};

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
