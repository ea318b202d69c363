#include "common/cuda.h"
#include "modulated_graph_conv/cuda_dispatch.h"

namespace diffupose {
namespace {

// A thread takes all joints of a few channels of one pose: what the neighbours give stays in its registers, and the
// adjacency product needs no other thread. Memory is the limit: with 17 joints a channel of a pose is 204 bytes in
// float32 and 102 in bfloat16, for about 310 multiply-adds. Four channels make accesses of 16 and 8 bytes and 68
// registers of neighbours; all loads of the product are in flight at once, the joints' own as they lie in memory. Small
// blocks leave little behind at the end of the grid.
constexpr int kForwardThreads = 128;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// What follows the sums of one joint, whose numbers begin at `at`.
template <int kChannels, typename Out>
__device__ __forceinline__ void finish(const GraphConvEpilogue& epilogue, int64_t at, int64_t channel,
                                       float (&y)[kChannels]) {
    float a[kChannels], b[kChannels];
    if (epilogue.scale != nullptr) {
        load<kChannels>(epilogue.scale + channel, a);
        load<kChannels>(epilogue.shift + channel, b);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] = y[v] * a[v] + b[v];
    }
    if (epilogue.activation == EpilogueActivation::relu) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] = y[v] < 0.0f ? 0.0f : y[v];  // NaN stays NaN
    } else if (epilogue.activation == EpilogueActivation::gelu) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] = gelu(y[v]);
    }
    if (epilogue.residual != nullptr) {
        load<kChannels>(static_cast<const Out*>(epilogue.residual) + at, a);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] += a[v];
    }
    if (epilogue.film_scale != nullptr) {
        load<kChannels>(epilogue.film_scale + channel, a);
        load<kChannels>(epilogue.film_shift + channel, b);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] = silu(y[v] * a[v] + b[v]);
    }
}

template <int kJoints, int kChannels, typename Hidden, typename Out>
__global__ void __launch_bounds__(kForwardThreads, kChannels == 2 ? 3 : 2)
    modulated_graph_conv_fwd_kernel(const Hidden* __restrict__ hidden, const float* __restrict__ modulation,
                                    const float* __restrict__ adjacency, const float* __restrict__ bias,
                                    GraphConvEpilogue epilogue, Out* out, GraphConvSizes sizes) {
    constexpr bool kExact = kJoints != kGraphConvMaxJoints;
    constexpr int kPitch = (kJoints + 3) / 4 * 4;
    [[maybe_unused]] constexpr int kUnroll = kExact ? kJoints : 1;
    const int joints = kExact ? kJoints : static_cast<int>(sizes.num_joints);
    // The adjacency with a diagonal of 0, in rows that are read four numbers at a time.
    __shared__ __align__(16) float rows[kJoints * kPitch];
    __shared__ float diagonal[kJoints];
    for (int i = static_cast<int>(threadIdx.x); i < joints * kPitch; i += kForwardThreads) {
        const int to = i / kPitch, from = i % kPitch;
        rows[i] = from < joints && from != to ? adjacency[to * joints + from] : 0.0f;
        if (from == to) diagonal[to] = adjacency[to * joints + to];
    }
    __syncthreads();

    // No loop over poses: the compiler would keep the whole adjacency in registers.
    const int64_t channels = sizes.channels, groups = channels / kChannels;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kForwardThreads + threadIdx.x;
    if (unit >= sizes.num_poses * groups) return;
    const int64_t pose = unit / groups, channel = unit % groups * kChannels;
    const Hidden* own = hidden + pose * joints * 2 * channels + channel;
    float neighbors[kPitch][kChannels] = {};
    Packed<kChannels, Hidden> early[kExact ? kJoints : 1];
    const auto modulate = [&](int i) {
        float factor[kChannels];
        load<kChannels>(modulation + i * channels + channel, factor);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) neighbors[i][v] *= factor[v];
    };
#pragma unroll
    for (int i = 0; i < kJoints; ++i) {
        if (i >= joints) continue;
        load<kChannels>(own + (2 * i + 1) * channels, neighbors[i]);
        if constexpr (kExact) {
            load_packed<kChannels>(own + 2 * i * channels, early[i]);
        } else {
            modulate(i);
        }
    }
    if constexpr (kExact) {
#pragma unroll
        for (int i = 0; i < kJoints; ++i) modulate(i);
    }
    float shift[kChannels] = {};
    if (bias != nullptr) load<kChannels>(bias + channel, shift);
#pragma unroll kUnroll
    for (int j = 0; j < joints; ++j) {
        float y[kChannels], factor[kChannels];
        if constexpr (kExact) {
            unpack<kChannels>(early[j], y);
        } else {
            load<kChannels>(own + 2 * j * channels, y);
        }
        load<kChannels>(modulation + j * channels + channel, factor);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] *= diagonal[j] * factor[v];
#pragma unroll
        for (int first = 0; first < kJoints; first += 4) {
            if (first >= joints) continue;
            float weights[4];
            load<4>(rows + j * kPitch + first, weights);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int v = 0; v < kChannels; ++v) y[v] += weights[k] * neighbors[first + k][v];
            }
        }
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[v] += shift[v];
        const int64_t at = (pose * joints + j) * channels + channel;
        finish<kChannels, Out>(epilogue, at, channel, y);
        store<kChannels>(out + at, y);
    }
}

}  // namespace

void launch_modulated_graph_conv_fwd_cuda(ConstArray hidden, const float* modulation, const float* adjacency,
                                          const float* bias, const GraphConvEpilogue& epilogue, Array out,
                                          GraphConvSizes sizes, void* stream) {
    if (sizes.num_poses == 0) return;
    bool vectors = sizes.channels % 4 == 0 && takes_four(hidden.data, hidden.storage) &&
                   takes_four(out.data, out.storage) && takes_four(epilogue.residual, out.storage);
    for (const float* row :
         {modulation, bias, epilogue.scale, epilogue.shift, epilogue.film_scale, epilogue.film_shift}) {
        vectors = vectors && is_aligned(row, 4);
    }
    with_graph_conv_instance(hidden.storage, out.storage, sizes, vectors, [&](auto instance) {
        using Instance = decltype(instance);
        using Hidden = typename Instance::Hidden;
        using Out = typename Instance::Out;
        const int64_t units = sizes.num_poses * (sizes.channels / Instance::kChannels);
        const int64_t blocks = (units + kForwardThreads - 1) / kForwardThreads;
        const auto kernel = modulated_graph_conv_fwd_kernel<Instance::kJoints, Instance::kChannels, Hidden, Out>;
        DIFFUPOSE_LAUNCH(kernel, static_cast<unsigned>(blocks), kForwardThreads, 0, stream,
                         static_cast<const Hidden*>(hidden.data), modulation, adjacency, bias, epilogue,
                         static_cast<Out*>(out.data), sizes);
        check_launch("modulated_graph_conv_fwd");
    });
}

}  // namespace diffupose
