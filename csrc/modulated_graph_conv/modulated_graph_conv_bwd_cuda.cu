#include <algorithm>

#include "common/cuda.h"
#include "modulated_graph_conv/cuda_dispatch.h"

namespace diffupose {
namespace {

// First stage. A thread block takes a part of the poses and a slice of the channels; a warp takes three joints, a lane
// a few channels. For its joints a warp reads all of grad_out and all neighbours' features, which the adjacency's
// gradient needs. The warps of a block read the same lines, so that memory is read once: with 17 joints, a channel of a
// pose is 340 bytes in float32 and 170 in bfloat16, for about 680 multiply-adds. Three joints need 51 sums of the
// adjacency's gradient. With 168 registers two blocks of 192 threads fit a multiprocessor; a third block would need
// spills.
constexpr int kWarpSize = 32, kRows = 3;
// Sums over poses are taken in parts that depend on the sizes alone. With 384 channels, 88 parts are 264 blocks in 16
// bits and 528 in 32 bits: an H200 has 132 multiprocessors, and each runs two blocks at a time.
constexpr int64_t kMaxParts = 88, kMinPosesPerPart = 8;
constexpr int kMaxWarps = (static_cast<int>(kGraphConvMaxJoints) + kRows - 1) / kRows;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t num_parts(const GraphConvSizes& sizes) {
    return std::clamp<int64_t>(sizes.num_poses / kMinPosesPerPart, 1, kMaxParts);
}

// The sums of a part that the second stage adds: the modulation's gradient [J, C], the bias's for each warp's joints
// [warps, C], the adjacency's for each slice of channels [slices, J, J].
struct PartSizes {
    int64_t modulation, bias, adjacency, all;
    int warps;
    int64_t slices;
};

PartSizes part_sizes(const GraphConvSizes& sizes, int channels_per_lane) {
    PartSizes part = {};
    part.warps = static_cast<int>(ceil_div(sizes.num_joints, kRows));
    part.slices = ceil_div(sizes.channels, kWarpSize * channels_per_lane);
    part.modulation = sizes.num_joints * sizes.channels;
    part.bias = part.warps * sizes.channels;
    part.adjacency = part.slices * sizes.num_joints * sizes.num_joints;
    // Every part begins at a multiple of 16 bytes.
    part.all = ceil_div(part.modulation + part.bias + part.adjacency, 4) * 4;
    return part;
}

// Neighbours whose products a thread sums at a time.
template <int kJoints>
constexpr int kAtOnce = kJoints == kGraphConvMaxJoints ? 4 : kJoints;

template <int kJoints>
constexpr int shared_bytes(int joints, int warps) {
    return 4 * (joints * warps * 4 + warps * kAtOnce<kJoints> * (kWarpSize + 1));
}
static_assert(shared_bytes<kGraphConvMaxJoints>(kGraphConvMaxJoints, kMaxWarps) <= 48 << 10, "more must be asked for");

// Returns its argument, but hides that from the compiler. Otherwise the compiler would load the data before the loop
// over poses and keep it in registers that the sums need.
__device__ __forceinline__ const float* reload(const float* pointer) {
#ifdef __CUDACC__
    asm volatile("" : "+l"(pointer));
#endif
    return pointer;
}

template <int kJoints, int kChannels, typename Hidden, typename Out>
__global__ void __launch_bounds__(kWarpSize*(kJoints == kGraphConvMaxJoints ? kMaxWarps : 6),
                                  kJoints == kGraphConvMaxJoints ? 1 : 2)
    modulated_graph_conv_bwd_kernel(const Out* __restrict__ grad_out, const Hidden* __restrict__ hidden,
                                    const float* __restrict__ modulation, const float* __restrict__ adjacency,
                                    Hidden* __restrict__ grad_hidden, float* __restrict__ parts, PartSizes part_size,
                                    GraphConvSizes sizes) {
    constexpr bool kExact = kJoints != kGraphConvMaxJoints;
    constexpr int kSums = kAtOnce<kJoints>;
    const int joints = kExact ? kJoints : static_cast<int>(sizes.num_joints);
    const int warps = kExact ? (kJoints + kRows - 1) / kRows : part_size.warps;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t channels = sizes.channels;
    const int64_t channel = (static_cast<int64_t>(blockIdx.y) * kWarpSize + lane) * kChannels;

    // columns[i][warp]: the weights of joint i's grad_out for the warp's three joints; the fourth number is alignment.
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    float* columns = reinterpret_cast<float*>(memory);
    float* lanes = columns + joints * warps * 4 + warp * kSums * (kWarpSize + 1);
    for (int i = static_cast<int>(threadIdx.x); i < joints * warps * 4; i += static_cast<int>(blockDim.x)) {
        const int from = i / (4 * warps), to = i / 4 % warps * kRows + i % 4;
        columns[i] = i % 4 < kRows && to < joints && to != from ? adjacency[from * joints + to] : 0.0f;
    }
    __syncthreads();

    const int first_row = warp * kRows;
    float diagonal[kRows];
    for (int k = 0; k < kRows; ++k) {
        const int row = first_row + k;
        diagonal[k] = row < joints ? adjacency[row * joints + row] : 0.0f;
    }
    const int64_t part = blockIdx.x, begin = sizes.num_poses * part / gridDim.x,
                  end = sizes.num_poses * (part + 1) / gridDim.x;
    float* result = parts + part * part_size.all;
    float own_sums[kRows] = {};  // for the diagonal, in the first round
    // If the compiler does not know the number of joints, the sums of all neighbours do not fit registers: several
    // rounds.
    for (int first = 0; first < joints; first += kSums) {
        float outer[kRows][kSums] = {};
        float modulation_sums[kRows][kChannels] = {}, bias_sums[kChannels] = {};
        for (int64_t pose = begin; pose < end && channel < channels; ++pose) {
            const float* factors = reload(modulation + channel);
            const Out* gradients = grad_out + pose * joints * channels + channel;
            const Hidden* features = hidden + pose * joints * 2 * channels + channel;
            float gradient[kRows][kChannels] = {};
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                if (first_row + k < joints) load<kChannels>(gradients + (first_row + k) * channels, gradient[k]);
            }
            if (first == 0) {
                float back[kRows][kChannels] = {};
#pragma unroll 4
                for (int i = 0; i < joints; ++i) {
                    float value[kChannels], weights[4];
                    load<kChannels>(gradients + i * channels, value);
                    load<4>(columns + (i * warps + warp) * 4, weights);
#pragma unroll
                    for (int k = 0; k < kRows; ++k) {
#pragma unroll
                        for (int v = 0; v < kChannels; ++v) back[k][v] += weights[k] * value[v];
                    }
                }
                Hidden* grad_features = grad_hidden + pose * joints * 2 * channels + channel;
#pragma unroll
                for (int k = 0; k < kRows; ++k) {
                    const int row = first_row + k;
                    if (row >= joints) continue;
                    float own[kChannels], neighbor[kChannels], factor[kChannels];
                    load<kChannels>(features + 2 * row * channels, own);
                    load<kChannels>(features + (2 * row + 1) * channels, neighbor);
                    load<kChannels>(factors + row * channels, factor);
#pragma unroll
                    for (int v = 0; v < kChannels; ++v) {
                        const float product = own[v] * gradient[k][v];
                        own_sums[k] += factor[v] * product;
                        modulation_sums[k][v] += diagonal[k] * product + neighbor[v] * back[k][v];
                        bias_sums[v] += gradient[k][v];
                        own[v] = diagonal[k] * factor[v] * gradient[k][v];
                        neighbor[v] = factor[v] * back[k][v];
                    }
                    store<kChannels>(grad_features + 2 * row * channels, own);
                    store<kChannels>(grad_features + (2 * row + 1) * channels, neighbor);
                }
            }
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (first + i >= joints) continue;
                float value[kChannels], factor[kChannels];
                load<kChannels>(features + (2 * (first + i) + 1) * channels, value);
                load<kChannels>(factors + (first + i) * channels, factor);
#pragma unroll
                for (int v = 0; v < kChannels; ++v) value[v] *= factor[v];
#pragma unroll
                for (int k = 0; k < kRows; ++k) {
#pragma unroll
                    for (int v = 0; v < kChannels; ++v) outer[k][i] += gradient[k][v] * value[v];
                }
            }
        }
        if (first == 0 && channel < channels) {
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                if (first_row + k < joints) {
                    store<kChannels>(result + (first_row + k) * channels + channel, modulation_sums[k]);
                }
            }
            store<kChannels>(result + part_size.modulation + warp * channels + channel, bias_sums);
        }
        // Over the lanes, one after the other.
        float* to = result + part_size.modulation + part_size.bias + blockIdx.y * joints * joints;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const int row = first_row + k;
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                lanes[i * (kWarpSize + 1) + lane] = first + i == row ? own_sums[k] : outer[k][i];
            }
            __syncwarp();
            const int column = first + lane;
            if (lane < kSums && column < joints && row < joints) {
                float sum = 0.0f;
                for (int other = 0; other < kWarpSize; ++other) sum += lanes[lane * (kWarpSize + 1) + other];
                to[row * joints + column] = sum;
            }
            __syncwarp();
        }
    }
}

// Second stage: the sums over the parts, each in eight shares that are added in their order.
constexpr int kShares = 8;

__global__ void __launch_bounds__(kWarpSize* kShares)
    modulated_graph_conv_sums_kernel(const float* __restrict__ parts, int64_t count, PartSizes part_size,
                                     GraphConvSizes sizes, float* __restrict__ grad_modulation,
                                     float* __restrict__ grad_adjacency, float* __restrict__ grad_bias) {
    __shared__ float shares[kShares][kWarpSize];
    const int share = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane, channels = sizes.channels;
    const int64_t square = sizes.num_joints * sizes.num_joints;
    // Where the summands of this result lie in a part: `terms` of them, `stride` apart.
    float* to = nullptr;
    int64_t from = 0, terms = 0, stride = 0;
    if (index < part_size.modulation) {
        to = grad_modulation + index, from = index, terms = 1;
    } else if (index < part_size.modulation + channels) {
        const int64_t channel = index - part_size.modulation;
        to = grad_bias + channel, from = index, terms = part_size.warps, stride = channels;
    } else if (index < part_size.modulation + channels + square) {
        const int64_t pair = index - part_size.modulation - channels;
        to = grad_adjacency + pair, from = part_size.modulation + part_size.bias + pair;
        terms = part_size.slices, stride = square;
    }
    float sum = 0.0f;
    for (int64_t part = share; part < count; part += kShares) {
        for (int64_t term = 0; term < terms; ++term) sum += parts[part * part_size.all + from + term * stride];
    }
    shares[share][lane] = sum;
    __syncthreads();
    if (share == 0 && to != nullptr) {
        float total = 0.0f;
        for (int i = 0; i < kShares; ++i) total += shares[i][lane];
        *to = total;
    }
}

}  // namespace

int64_t graph_conv_bwd_workspace(GraphConvSizes sizes) { return num_parts(sizes) * part_sizes(sizes, 1).all; }

void launch_modulated_graph_conv_bwd_cuda(ConstArray grad_out, ConstArray hidden, const float* modulation,
                                          const float* adjacency, void* grad_hidden, float* grad_modulation,
                                          float* grad_adjacency, float* grad_bias, float* workspace,
                                          GraphConvSizes sizes, void* stream) {
    const bool vectors = sizes.channels % 4 == 0 && takes_four(hidden.data, hidden.storage) &&
                         takes_four(grad_out.data, grad_out.storage) && takes_four(grad_hidden, hidden.storage) &&
                         is_aligned(modulation, 4) && is_aligned(workspace, 4);
    const int64_t parts = num_parts(sizes);
    with_graph_conv_instance(hidden.storage, grad_out.storage, sizes, vectors, [&](auto instance) {
        using Instance = decltype(instance);
        using Hidden = typename Instance::Hidden;
        using Out = typename Instance::Out;
        const PartSizes part_size = part_sizes(sizes, Instance::kChannels);
        const int bytes = shared_bytes<Instance::kJoints>(static_cast<int>(sizes.num_joints), part_size.warps);
        const auto kernel = modulated_graph_conv_bwd_kernel<Instance::kJoints, Instance::kChannels, Hidden, Out>;
        const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(part_size.slices));
        DIFFUPOSE_LAUNCH(kernel, grid, static_cast<unsigned>(kWarpSize * part_size.warps), bytes, stream,
                         static_cast<const Out*>(grad_out.data), static_cast<const Hidden*>(hidden.data), modulation,
                         adjacency, static_cast<Hidden*>(grad_hidden), workspace, part_size, sizes);
        check_launch("modulated_graph_conv_bwd");
        const int64_t results = part_size.modulation + sizes.channels + sizes.num_joints * sizes.num_joints;
        DIFFUPOSE_LAUNCH(modulated_graph_conv_sums_kernel, static_cast<unsigned>(ceil_div(results, kWarpSize)),
                         kWarpSize * kShares, 0, stream, workspace, parts, part_size, sizes, grad_modulation,
                         grad_adjacency, grad_bias);
        check_launch("modulated_graph_conv_sums");
    });
}

}  // namespace diffupose
