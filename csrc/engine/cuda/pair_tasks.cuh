// The layers of a pose tile that are no products, cut into tasks of one warp, in the layout `pairs`. The kernels
// (layers.cu, persistent_mma.cu) spread tasks over warps and blocks; the results do not depend on it.
#pragma once

#include "engine/cuda/finish.cuh"
#include "engine/cuda/fragments.cuh"

namespace diffupose {

// --- Scale and shift -------------------------------------------------------------------------------------------------

// Sum over the four lanes that share a pose. All four get the same bits.
__device__ inline float sum_over_quarters(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// normalized(x) * scale + shift, or silu(x * scale + shift), of two joints of all poses.
template <typename T>
__device__ inline void scale_shift_task(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                                        int pair, Lane lane) {
    const T* x = at<const T>(memory, layer.input);
    T* y = at<T>(memory, layer.output);
    const int channel_blocks = layer.input_blocks;
    float mean[2] = {}, factor[2] = {1.0f, 1.0f}, record[kRecord];
    if (layer.normalize) {
        const float count = static_cast<float>(layer.channels);
        for (int channel_block = 0; channel_block < channel_blocks; ++channel_block) {
            load8(x + record_index(pair, channel_block, channel_blocks, lane.index), record);
#pragma unroll
            for (int i = 0; i < kRecord; ++i) mean[i / 2 % 2] += record[i];  // padded channels are 0
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) mean[which] = sum_over_quarters(mean[which]) / count;
        float squares[2] = {};
        for (int channel_block = 0; channel_block < channel_blocks; ++channel_block) {
            load8(x + record_index(pair, channel_block, channel_blocks, lane.index), record);
#pragma unroll
            for (int i = 0; i < kRecord; ++i) {
                const int channel = channel_block * kChannelBlock + 2 * lane.quarter + i / 4 * 8 + i % 2;
                const float difference = record[i] - mean[i / 2 % 2];
                if (channel < layer.channels) squares[i / 2 % 2] += difference * difference;
            }
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            factor[which] = 1.0f / sqrtf(sum_over_quarters(squares[which]) / count + layer.eps);
        }
    }
    const float* scale = parameters + layer.parameters;
    const float* shift = scale + channel_blocks * kChannelBlock;
    for (int channel_block = 0; channel_block < channel_blocks; ++channel_block) {
        const int index = record_index(pair, channel_block, channel_blocks, lane.index);
        load8(x + index, record);
#pragma unroll
        for (int i = 0; i < kRecord; ++i) {
            const int channel = channel_block * kChannelBlock + 2 * lane.quarter + i / 4 * 8 + i % 2;
            const int which = i / 2 % 2;
            record[i] =
                scale_shift(layer.normalize, record[i], mean[which], factor[which], scale[channel], shift[channel]);
        }
        store8(y + index, record);
    }
}

// --- Attention -------------------------------------------------------------------------------------------------------

// softmax(q k^T) of one head, of two joints of all poses against all joints: weights [head][joint][joint][pose]. Padded
// joints have queries but weight 0 as keys. The input holds the queries of all heads and then the keys.
template <typename T, int kPairs>
__device__ inline void attention_weights_task(const LayerRecord& layer, unsigned char* memory, int joints, int head,
                                              int pair, Lane lane) {
    const T* x = at<const T>(memory, layer.input);
    const int channel_blocks = layer.input_blocks, head_blocks = channel_blocks / 2 / layer.num_heads;
    float dots[2][2 * kPairs] = {};
    for (int channel_block = head * head_blocks; channel_block < (head + 1) * head_blocks; ++channel_block) {
        float query[kRecord], key[kRecord];
        load8(x + record_index(pair, channel_block, channel_blocks, lane.index), query);
#pragma unroll
        for (int other = 0; other < kPairs; ++other) {
            load8(x + record_index(other, channel_block + channel_blocks / 2, channel_blocks, lane.index), key);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& dot = dots[i][2 * other + j];
                    dot = fmaf(query[2 * i], key[2 * j], dot), dot = fmaf(query[2 * i + 1], key[2 * j + 1], dot);
                    dot = fmaf(query[2 * i + 4], key[2 * j + 4], dot);
                    dot = fmaf(query[2 * i + 5], key[2 * j + 5], dot);
                }
            }
        }
    }
    float* weights = at<float>(memory, layer.weights);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float highest = -INFINITY, total = 0.0f;
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) {
            dots[i][j] = sum_over_quarters(dots[i][j]);
            dots[i][j] = j < joints ? dots[i][j] : -INFINITY;
            highest = fmaxf(highest, dots[i][j]);
        }
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) {
            dots[i][j] = expf(dots[i][j] - highest);
            total += dots[i][j];
        }
        const float factor = 1.0f / total;
        float* row = weights + (head * 2 * kPairs + 2 * pair + i) * 2 * kPairs * kTilePoses + lane.pose;
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) {
            // The four lanes of a pose hold the same numbers. Each stores a quarter of them.
            if (j % 4 == lane.quarter) row[j * kTilePoses] = dots[i][j] * factor;
        }
    }
}

// The attention-weighted values of one channel block.
template <typename T, int kPairs>
__device__ inline void attention_apply_task(const LayerRecord& layer, unsigned char* memory, int channel_block,
                                            Lane lane) {
    const T* x = at<const T>(memory, layer.input);
    T* y = at<T>(memory, layer.output);
    const int channel_blocks = layer.output_blocks, head = channel_block / (channel_blocks / layer.num_heads);
    const float* weights = at<const float>(memory, layer.weights) + head * 4 * kPairs * kPairs * kTilePoses + lane.pose;
    float values[kPairs][kRecord];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
        load8(x + record_index(pair, channel_block, channel_blocks, lane.index), values[pair]);
    for (int pair = 0; pair < kPairs; ++pair) {
        float result[kRecord] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 2 * kPairs; ++j) {
                const float weight = weights[((2 * pair + i) * 2 * kPairs + j) * kTilePoses];
                const float* value = values[j / 2] + j % 2 * 2;
                float* to = result + 2 * i;
                to[0] = fmaf(weight, value[0], to[0]), to[1] = fmaf(weight, value[1], to[1]);
                to[4] = fmaf(weight, value[4], to[4]), to[5] = fmaf(weight, value[5], to[5]);
            }
        }
        store8(y + record_index(pair, channel_block, channel_blocks, lane.index), result);
    }
}

}  // namespace diffupose
