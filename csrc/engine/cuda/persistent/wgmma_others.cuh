// The layers of a pose tile that are no products, in the layout of wgmma_layers.cuh.
#pragma once

#include "engine/cuda/persistent/wgmma_layers.cuh"

namespace diffupose {

// --- Scale and shift -------------------------------------------------------------------------------------------------

// Sum over the eight lanes that share two poses. All eight get the same bits.
__device__ inline float sum_over_rows(float value) {
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
    return value;
}

// normalized(x) * scale + shift, or silu(x * scale + shift), of a joint of all poses.
__device__ inline void scale_shift_joint(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                                         int joint, Place place) {
    const int channels = layer.input_blocks * kChannelBlock;
    const int begin = WgmmaLayout::index(joint, 2 * place.quarter, place.row, layer.input_blocks);
    const Bfloat16* x = at<const Bfloat16>(memory, layer.input) + begin;
    Bfloat16* y = at<Bfloat16>(memory, layer.output) + begin;
    float2 mean = {0.0f, 0.0f}, factor = {1.0f, 1.0f};
    if (layer.normalize) {
        const float count = static_cast<float>(layer.channels);
#pragma unroll 2
        for (int channel = 0; channel < channels; channel += 8) {
            const float2 value = load_poses(x + channel * kTilePoses);
            mean.x += value.x, mean.y += value.y;  // padded channels are 0
        }
        mean = {sum_over_rows(mean.x) / count, sum_over_rows(mean.y) / count};
        float2 squares = {0.0f, 0.0f};
#pragma unroll 2
        for (int channel = 0; channel < channels; channel += 8) {
            const float2 value = load_poses(x + channel * kTilePoses);
            const float2 difference = {value.x - mean.x, value.y - mean.y};
            if (channel + place.row < layer.channels) {
                squares.x += difference.x * difference.x, squares.y += difference.y * difference.y;
            }
        }
        factor = {1.0f / sqrtf(sum_over_rows(squares.x) / count + layer.eps),
                  1.0f / sqrtf(sum_over_rows(squares.y) / count + layer.eps)};
    }
    const float* scale = parameters + layer.parameters + place.row;
#pragma unroll 2
    for (int channel = 0; channel < channels; channel += 8) {
        const float2 value = load_poses(x + channel * kTilePoses);
        const auto scaled = [&](float x, float mean_of, float factor_of) {
            return scale_shift(layer.normalize, x, mean_of, factor_of, scale[channel], scale[channels + channel]);
        };
        store_poses(y + channel * kTilePoses,
                    make_float2(scaled(value.x, mean.x, factor.x), scaled(value.y, mean.y, factor.y)));
    }
}

// --- Attention -------------------------------------------------------------------------------------------------------

// Adds kCount numbers over eight lanes. Each lane gets kCount / 8 of the sums, those from `row * kCount / 8` on, in its
// first values.
template <int kCount>
__device__ inline void share_sums(float2* values, int row) {
    int half = kCount / 2;
#pragma unroll
    for (int bit = 4; bit > 0; bit /= 2, half /= 2) {
        const bool upper = (row & bit) != 0;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            if (i >= half) continue;
            const float2 kept = upper ? values[i + half] : values[i];
            const float2 given = upper ? values[i] : values[i + half];
            values[i] = {kept.x + __shfl_xor_sync(0xffffffffu, given.x, 4 * bit),
                         kept.y + __shfl_xor_sync(0xffffffffu, given.y, 4 * bit)};
        }
    }
}

// softmax(q k^T) of one head and one joint of all poses against all joints: weights [head][joint][joint][pose]. The
// input holds the queries of all heads and then the keys.
template <int kJoints>
__device__ inline void attention_weights_joint(const LayerRecord& layer, unsigned char* memory, int joints, int head,
                                               int joint, Place place) {
    constexpr int kShare = 3, kDots = 8 * kShare;  // of the eight lanes that share two poses
    const int channels = layer.input_blocks * kChannelBlock / 2, head_channels = channels / layer.num_heads;
    const Bfloat16* x = at<const Bfloat16>(memory, layer.input) +
                        WgmmaLayout::index(0, 2 * place.quarter, head * head_channels + place.row, layer.input_blocks);
    float2 dots[kDots] = {};
    for (int channel = 0; channel < head_channels; channel += 8) {
        const Bfloat16* from = x + channel * kTilePoses;
        const float2 query = load_poses(from + WgmmaLayout::index(joint, 0, 0, layer.input_blocks));
#pragma unroll
        for (int j = 0; j < kJoints; ++j) {
            const float2 key = load_poses(from + WgmmaLayout::index(j, 0, channels, layer.input_blocks));
            dots[j] = {fmaf(query.x, key.x, dots[j].x), fmaf(query.y, key.y, dots[j].y)};
        }
    }
    share_sums<kDots>(dots, place.row);
    float2 highest = {-INFINITY, -INFINITY}, total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        if (kShare * place.row + i >= joints) dots[i] = {-INFINITY, -INFINITY};
        highest = {fmaxf(highest.x, dots[i].x), fmaxf(highest.y, dots[i].y)};
    }
#pragma unroll
    for (int bit = 4; bit < kWarpSize; bit *= 2) {
        highest = {fmaxf(highest.x, __shfl_xor_sync(0xffffffffu, highest.x, bit)),
                   fmaxf(highest.y, __shfl_xor_sync(0xffffffffu, highest.y, bit))};
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        dots[i] = {expf(dots[i].x - highest.x), expf(dots[i].y - highest.y)};
        total.x += dots[i].x, total.y += dots[i].y;
    }
    const float2 factor = {1.0f / sum_over_rows(total.x), 1.0f / sum_over_rows(total.y)};
    float* row = at<float>(memory, layer.weights) + (head * kJoints + joint) * kJoints * kTilePoses + 2 * place.quarter;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int j = kShare * place.row + i;
        if (j < kJoints) store_poses(row + j * kTilePoses, {dots[i].x * factor.x, dots[i].y * factor.y});
    }
}

// The attention-weighted values of one channel block.
template <int kJoints>
__device__ inline void attention_apply_block(const LayerRecord& layer, unsigned char* memory, int channel_block,
                                             Place place) {
    const int channel_blocks = layer.output_blocks, head = channel_block / (channel_blocks / layer.num_heads);
    const int begin =
        WgmmaLayout::index(0, 2 * place.quarter, channel_block * kChannelBlock + place.row, channel_blocks);
    const int upper = 8 * kTilePoses, next = WgmmaLayout::index(1, 0, 0, channel_blocks);
    const Bfloat16* x = at<const Bfloat16>(memory, layer.input) + begin;
    Bfloat16* y = at<Bfloat16>(memory, layer.output) + begin;
    const float* weights =
        at<const float>(memory, layer.weights) + head * kJoints * kJoints * kTilePoses + 2 * place.quarter;
    float2 values[kJoints][2];
#pragma unroll
    for (int j = 0; j < kJoints; ++j) {
        values[j][0] = load_poses(x + j * next), values[j][1] = load_poses(x + j * next + upper);
    }
    for (int joint = 0; joint < kJoints; ++joint) {
        float2 result[2] = {};
#pragma unroll
        for (int j = 0; j < kJoints; ++j) {
            const float2 weight = load_poses(weights + (joint * kJoints + j) * kTilePoses);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                result[half] = {fmaf(weight.x, values[j][half].x, result[half].x),
                                fmaf(weight.y, values[j][half].y, result[half].y)};
            }
        }
        store_poses(y + joint * next, result[0]), store_poses(y + joint * next + upper, result[1]);
    }
}

// A layer that is no product. All warps run it.
template <int kJoints>
__device__ inline void other_layer(const LayerRecord& layer, unsigned char* memory, int joints, Parameters parameters) {
    const Place place = this_place();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    if (layer.kind == LayerKind::scale_shift) {
        for (int i = warp; i < kJoints; i += kWgmmaWarps) scale_shift_joint(layer, memory, parameters.get(), i, place);
    } else if (layer.kind == LayerKind::attention_weights) {
        for (int i = warp; i < layer.num_heads * kJoints; i += kWgmmaWarps) {
            attention_weights_joint<kJoints>(layer, memory, joints, i / kJoints, i % kJoints, place);
        }
    } else {
        for (int i = warp; i < layer.output_blocks; i += kWgmmaWarps) {
            attention_apply_block<kJoints>(layer, memory, i, place);
        }
    }
}

}  // namespace diffupose
