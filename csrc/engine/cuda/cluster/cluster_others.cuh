// The layers of a cluster that are no products. Every block of the cluster computes all of each layer.
#pragma once

#include "engine/cuda/cluster/cluster_layers.cuh"

namespace diffupose {

__device__ inline float sum_over_warp(float value) {
#pragma unroll
    for (int bit = 1; bit < kWarpSize; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
    return value;
}

// normalized(x) * scale + shift, or silu(x * scale + shift). A warp takes two joints at the same time.
__device__ inline void scale_shift_joints(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                                          int joints, const ClusterPlace& place) {
    constexpr int kAtOnce = 2, kEarly = 3;  // channel blocks of a lane whose parameters are loaded first
    static_assert(kAtOnce * kClusterWarps >= kCudaMaxJoints);
    const int channel_blocks = layer.input_blocks, row = place.lane.pose;
    const float* scales = parameters + layer.parameters + 2 * place.lane.quarter;
    const float* shifts = scales + channel_blocks * kChannelBlock;
    const Bfloat16* x[kAtOnce];
    Bfloat16* y[kAtOnce];
    float mean[kAtOnce] = {}, factor[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const int joint = place.warp + i * kClusterWarps;
        const int index = ClusterLayout::index(joint < joints ? joint : 0, 2 * place.lane.quarter, channel_blocks);
        x[i] = at<const Bfloat16>(memory, layer.input) + index, y[i] = at<Bfloat16>(memory, layer.output) + index;
        factor[i] = 1.0f;
    }
    // Numbers 0 and 1 are channels 2t and 2t + 1 of the channel block, 2 and 3 are channels 2t + 8 and 2t + 9.
    struct Pairs {
        float2 lower, upper;
        __device__ void load(const float* from) {
            lower = __ldg(reinterpret_cast<const float2*>(from));
            upper = __ldg(reinterpret_cast<const float2*>(from + 8));
        }
        __device__ float operator[](int k) const {
            return k < 2 ? (k == 0 ? lower.x : lower.y) : (k == 2 ? upper.x : upper.y);
        }
    };
    Pairs scale[kEarly], shift[kEarly];
#pragma unroll
    for (int k = 0; k < kEarly; ++k) {
        const int channel_block = row + 8 * k < channel_blocks ? row + 8 * k : 0;
        scale[k].load(scales + channel_block * kChannelBlock), shift[k].load(shifts + channel_block * kChannelBlock);
    }
    constexpr int kStride = 4 * kWarpSize;  // from a channel block to the next
    if (layer.normalize) {
        const float count = static_cast<float>(layer.channels);
        for (int channel_block = row; channel_block < channel_blocks; channel_block += 8) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                float four[4];
                load4(x[i] + channel_block * kStride, four);
                mean[i] += (four[0] + four[1]) + (four[2] + four[3]);  // padded channels are 0
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) mean[i] = sum_over_warp(mean[i]) / count;
        float squares[kAtOnce] = {};
        for (int channel_block = row; channel_block < channel_blocks; channel_block += 8) {
            const int channel = channel_block * kChannelBlock + 2 * place.lane.quarter;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                float four[4];
                load4(x[i] + channel_block * kStride, four);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float difference = four[k] - mean[i];
                    if (channel + k / 2 * 8 + k % 2 < layer.channels) squares[i] += difference * difference;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) factor[i] = 1.0f / sqrtf(sum_over_warp(squares[i]) / count + layer.eps);
    }
    const auto scale_block = [&](int channel_block, const Pairs& by, const Pairs& plus) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (place.warp + i * kClusterWarps >= joints) continue;
            float four[4];
            load4(x[i] + channel_block * kStride, four);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                four[k] = scale_shift(layer.normalize, four[k], mean[i], factor[i], by[k], plus[k]);
            }
            store4(y[i] + channel_block * kStride, four);
        }
    };
#pragma unroll
    for (int k = 0; k < kEarly; ++k) {
        if (row + 8 * k < channel_blocks) scale_block(row + 8 * k, scale[k], shift[k]);
    }
    for (int channel_block = row + 8 * kEarly; channel_block < channel_blocks; channel_block += 8) {
        Pairs by, plus;
        by.load(scales + channel_block * kChannelBlock), plus.load(shifts + channel_block * kChannelBlock);
        scale_block(channel_block, by, plus);
    }
}

// softmax(q k^T) of one head, of the queries of a joint group: [head][key][query], padded queries included. The input
// holds the queries of all heads and then the keys. Keys are rows of the matrix instruction.
template <int kJointGroups>
__device__ inline void attend_from_eight(const LayerRecord& layer, unsigned char* memory, int joints, int head,
                                         int joint_group, Lane lane) {
    constexpr int kHalves = (kJointGroups + 1) / 2, kStride = 8 * kJointGroups;
    const uint2* x = at<const uint2>(memory, layer.input) + lane.index;
    const int channel_blocks = layer.input_blocks, head_blocks = channel_blocks / 2 / layer.num_heads;
    float dots[kHalves][4] = {};
    for (int channel_block = head * head_blocks; channel_block < (head + 1) * head_blocks; ++channel_block) {
        const uint2 query = x[(joint_group * channel_blocks + channel_block) * kWarpSize];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const uint2* keys = x + (2 * half * channel_blocks + channel_blocks / 2 + channel_block) * kWarpSize;
            const uint2 lower = keys[0],
                        upper = 2 * half + 1 < kJointGroups ? keys[channel_blocks * kWarpSize] : uint2{};
            multiply(dots[half], make_uint4(lower.x, upper.x, lower.y, upper.y), query.x, query.y);
        }
    }
    float* weights = at<float>(memory, layer.weights) + head * kStride * kStride + 8 * joint_group + 2 * lane.quarter;
    float highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const auto key_of_row = [&](int half, int i) { return 16 * half + i / 2 * 8 + lane.pose; };
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (key_of_row(half, i) >= joints) dots[half][i] = -INFINITY;
            highest[i % 2] = fmaxf(highest[i % 2], dots[half][i]);
        }
    }
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffffu, highest[i], bit));
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            dots[half][i] = expf(dots[half][i] - highest[i % 2]);
            total[i % 2] += dots[half][i];
        }
    }
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], bit);
    }
    const float factor[2] = {1.0f / total[0], 1.0f / total[1]};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            if (key_of_row(half, i) >= joints) continue;
            *reinterpret_cast<float2*>(weights + key_of_row(half, i) * kStride) =
                make_float2(dots[half][i] * factor[0], dots[half][i + 1] * factor[1]);
        }
    }
}

// The attention-weighted values. A thread takes two channels of four joints at a time.
template <int kJointGroups>
__device__ inline void attention_values(const LayerRecord& layer, unsigned char* memory, int joints) {
    constexpr int kFours = kJointGroups == 2 ? 4 : kRow / 4, kStride = 8 * kJointGroups;
    const int channel_blocks = layer.output_blocks, head_blocks = channel_blocks / layer.num_heads;
    const auto* x = at<const uint32_t>(memory, layer.input);
    auto* y = at<uint32_t>(memory, layer.output);
    for (int i = static_cast<int>(threadIdx.x); i < channel_blocks * kFours * 8; i += kClusterThreads) {
        const int pair = i % 8, first = i / 8 % kFours * 4, channel_block = i / (8 * kFours);
        const auto word = [&](int joint) {
            return ClusterLayout::index(joint, channel_block * kChannelBlock, channel_blocks) / 2 + pair;
        };
        const float* weights =
            at<const float>(memory, layer.weights) + channel_block / head_blocks * kStride * kStride + first;
        float lower[4] = {}, upper[4] = {};
#pragma unroll 4
        for (int joint = 0; joint < joints; ++joint) {
            const uint32_t value = x[word(joint)];
            float weight[4];
            load4(weights + joint * kStride, weight);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                lower[k] = fmaf(weight[k], float_of(value << 16), lower[k]);
                upper[k] = fmaf(weight[k], float_of(value & 0xffff0000u), upper[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (first + k < joints) y[word(first + k)] = pack_bfloat16(lower[k], upper[k]);
        }
    }
}

template <int kJointGroups>
__device__ inline void run_alone(const LayerRecord& layer, unsigned char* memory, const float* parameters, int joints,
                                 const ClusterPlace& place) {
    if (layer.kind == LayerKind::scale_shift) {
        scale_shift_joints(layer, memory, parameters, joints, place);
    } else if (layer.kind == LayerKind::attention_weights) {
        for (int i = place.warp; i < layer.num_heads * kJointGroups; i += kClusterWarps) {
            attend_from_eight<kJointGroups>(layer, memory, joints, i / kJointGroups, i % kJointGroups, place.lane);
        }
    } else {
        attention_values<kJointGroups>(layer, memory, joints);
    }
}

}  // namespace diffupose
