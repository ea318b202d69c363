#include "common/cuda.h"
#include "modulated_graph_conv/cuda_dispatch.h"

namespace diffupose {
namespace {

// A thread takes all joints of a few channels of one pose: the adjacency product needs no other thread. The kernel is
// bound by memory: with 17 joints, a channel of a pose is 204 bytes in float32 and 102 in bfloat16, for about 310
// multiply-adds. Small thread blocks keep the last wave of the grid short.
constexpr int kForwardThreads = 128;

// The compiler knows the number of joints: the sums of all joints stay in registers, and each joint's features are
// added to them once. All features are requested first, in accesses of 8 bytes, and stay packed as they lie in memory:
// with two or four channels a thread, 272 bytes are in flight for each of 384 threads.
template <int kJoints, int kChannels, typename Hidden, typename Out>
__global__ void __launch_bounds__(kForwardThreads, 3)
    modulated_graph_conv_fwd_kernel(const Hidden* __restrict__ hidden, const float* __restrict__ modulation,
                                    const float* __restrict__ adjacency, const float* __restrict__ bias,
                                    Out* __restrict__ out, GraphConvSizes sizes) {
    constexpr int kPitch = (kJoints + 3) / 4 * 4;
    const int64_t channels = sizes.channels, groups = channels / kChannels;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kForwardThreads + threadIdx.x;
    const bool inside = unit < sizes.num_poses * groups;
    const int64_t pose = unit / groups, channel = unit % groups * kChannels;
    Packed<kChannels, Hidden> own[kJoints], neighbors[kJoints];
    if (inside) {
        const Hidden* features = hidden + pose * kJoints * 2 * channels + channel;
#pragma unroll
        for (int i = 0; i < kJoints; ++i) {
            load_packed<kChannels>(features + 2 * i * channels, own[i]);
            load_packed<kChannels>(features + (2 * i + 1) * channels, neighbors[i]);
        }
    }
    // columns[i]: the weights of joint i in the sums of all joints, read four numbers at a time.
    __shared__ __align__(16) float columns[kJoints * kPitch];
    for (int i = static_cast<int>(threadIdx.x); i < kJoints * kPitch; i += kForwardThreads) {
        const int from = i / kPitch, to = i % kPitch;
        columns[i] = to < kJoints ? adjacency[to * kJoints + from] : 0.0f;
    }
    __syncthreads();
    // No loop over poses: the compiler would keep the whole adjacency in registers.
    if (!inside) return;

    float y[kJoints][kChannels], shift[kChannels] = {};
    if (bias != nullptr) load<kChannels>(bias + channel, shift);
#pragma unroll
    for (int j = 0; j < kJoints; ++j) {
#pragma unroll
        for (int v = 0; v < kChannels; ++v) y[j][v] = shift[v];
    }
#pragma unroll
    for (int i = 0; i < kJoints; ++i) {
        float factor[kChannels], itself[kChannels], other[kChannels];
        load<kChannels>(modulation + i * channels + channel, factor);
        unpack<kChannels>(own[i], itself);
        unpack<kChannels>(neighbors[i], other);
#pragma unroll
        for (int v = 0; v < kChannels; ++v) itself[v] *= factor[v], other[v] *= factor[v];
#pragma unroll
        for (int first = 0; first < kJoints; first += 4) {
            float weights[4];
            load<4>(columns + i * kPitch + first, weights);
#pragma unroll
            for (int j = first; j < first + 4 && j < kJoints; ++j) {
#pragma unroll
                for (int v = 0; v < kChannels; ++v) y[j][v] += weights[j - first] * (j == i ? itself[v] : other[v]);
            }
        }
    }
    Out* result = out + pose * kJoints * channels + channel;
#pragma unroll
    for (int j = 0; j < kJoints; ++j) store<kChannels>(result + j * channels, y[j]);
}

// Any number of joints: a thread takes one channel, with the neighbours' features in registers.
template <typename Hidden, typename Out>
__global__ void __launch_bounds__(kForwardThreads, 2)
    modulated_graph_conv_fwd_any_kernel(const Hidden* __restrict__ hidden, const float* __restrict__ modulation,
                                        const float* __restrict__ adjacency, const float* __restrict__ bias,
                                        Out* __restrict__ out, GraphConvSizes sizes) {
    constexpr int kMost = static_cast<int>(kGraphConvMaxJoints);
    const int joints = static_cast<int>(sizes.num_joints);
    // The adjacency with a diagonal of 0, in rows; four numbers are read at a time.
    __shared__ __align__(16) float rows[kMost * kMost];
    __shared__ float diagonal[kMost];
    for (int i = static_cast<int>(threadIdx.x); i < joints * kMost; i += kForwardThreads) {
        const int to = i / kMost, from = i % kMost;
        rows[i] = from < joints && from != to ? adjacency[to * joints + from] : 0.0f;
        if (from == to) diagonal[to] = adjacency[to * joints + to];
    }
    __syncthreads();

    const int64_t channels = sizes.channels;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kForwardThreads + threadIdx.x;
    if (unit >= sizes.num_poses * channels) return;
    const int64_t pose = unit / channels, channel = unit % channels;
    const Hidden* own = hidden + pose * joints * 2 * channels + channel;
    float neighbors[kMost] = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        if (i < joints) neighbors[i] = to_float(own[(2 * i + 1) * channels]) * modulation[i * channels + channel];
    }
    const float shift = bias != nullptr ? bias[channel] : 0.0f;
#pragma unroll 1
    for (int j = 0; j < joints; ++j) {
        float y[1] = {to_float(own[2 * j * channels]) * diagonal[j] * modulation[j * channels + channel]};
#pragma unroll
        for (int first = 0; first < kMost; first += 4) {
            if (first >= joints) break;
            float weights[4];
            load<4>(rows + j * kMost + first, weights);
#pragma unroll
            for (int k = 0; k < 4; ++k) y[0] += weights[k] * neighbors[first + k];
        }
        y[0] += shift;
        store<1>(out + (pose * joints + j) * channels + channel, y);
    }
}

}  // namespace

void launch_modulated_graph_conv_fwd_cuda(ConstArray hidden, const float* modulation, const float* adjacency,
                                          const float* bias, Array out, GraphConvSizes sizes, void* stream) {
    if (sizes.num_poses == 0) return;
    const bool vectors = sizes.channels % 4 == 0 && takes_four(hidden.data, hidden.storage) &&
                         takes_four(out.data, out.storage) && is_aligned(modulation, 4) && is_aligned(bias, 4);
    with_graph_conv_instance(hidden.storage, out.storage, sizes, vectors, [&](auto instance) {
        using Instance = decltype(instance);
        using Hidden = typename Instance::Hidden;
        using Out = typename Instance::Out;
        const int64_t units = sizes.num_poses * (sizes.channels / Instance::kChannels);
        const auto blocks = static_cast<unsigned>((units + kForwardThreads - 1) / kForwardThreads);
        const auto launch = [&](auto kernel) {
            DIFFUPOSE_LAUNCH(kernel, blocks, kForwardThreads, 0, stream, static_cast<const Hidden*>(hidden.data),
                             modulation, adjacency, bias, static_cast<Out*>(out.data), sizes);
            check_launch("modulated_graph_conv_fwd");
        };
        if constexpr (Instance::kJoints == kGraphConvMaxJoints) {
            launch(modulated_graph_conv_fwd_any_kernel<Hidden, Out>);
        } else {
            launch(modulated_graph_conv_fwd_kernel<Instance::kJoints, Instance::kChannels, Hidden, Out>);
        }
    });
}

}  // namespace diffupose
