// The layers of one tile of eight poses, cut into tasks for a warp each. How the tasks are spread over warps and blocks
// is the kernels' business (layers.cu, persistent_mma.cu); a task's numbers do not depend on it.
#pragma once

#include "engine/cuda/fragments.cuh"

namespace diffupose {

template <typename T>
__device__ inline T* at(unsigned char* memory, int64_t offset) {
    return reinterpret_cast<T*>(memory + offset);
}

template <CudaActivation kActivation>
__device__ inline float activate(float x) {
    if constexpr (kActivation == CudaActivation::relu) return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    if constexpr (kActivation == CudaActivation::gelu) return 0.5f * x * (1.0f + erff(x * 0.707106781186547524f));
    return x;
}

// x / (1 + exp(-x)); the quotient within two units in the last place.
__device__ inline float silu(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(x, 1.0f + expf(-x));
#else
    return x / (1.0f + expf(-x));
#endif
}

// --- Graph convolutions and linear layers ----------------------------------------------------------------------------

// activation(bias + own * H0 + A (neighbors * H1)), in place of H0.
template <int kPairs, int kBlocks>
__device__ inline void mix_joints(const LayerRecord& layer, Sums<kPairs, 2, kBlocks>& sums, int block, Lane lane) {
    const int channels = layer.output_steps * kStepChannels;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const int channel = (block + n) * 8 + 2 * lane.quarter;
#pragma unroll
        for (int joint = 0; joint < 2 * kPairs; ++joint) {
            float* own = sums.values[0][joint / 2][n] + joint % 2 * 2;
            float* other = sums.values[1][joint / 2][n] + joint % 2 * 2;
            const float2 factor = *reinterpret_cast<const float2*>(layer.own + joint * channels + channel);
            const float2 modulation = *reinterpret_cast<const float2*>(layer.neighbors + joint * channels + channel);
            own[0] *= factor.x, own[1] *= factor.y;
            other[0] *= modulation.x, other[1] *= modulation.y;
        }
    }
#pragma unroll
    for (int joint = 0; joint < 2 * kPairs; ++joint) {
        const float* row = layer.adjacency + joint * kAdjacencyStride;
#pragma unroll
        for (int four = 0; four < (2 * kPairs + 3) / 4; ++four) {
            float a[4];
            load4(row + 4 * four, a);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                float* own = sums.values[0][joint / 2][n] + joint % 2 * 2;
#pragma unroll
                for (int j = 4 * four; j < 4 * four + 4 && j < 2 * kPairs; ++j) {
                    const float* other = sums.values[1][j / 2][n] + j % 2 * 2;
                    own[0] = fmaf(a[j % 4], other[0], own[0]), own[1] = fmaf(a[j % 4], other[1], own[1]);
                }
            }
        }
    }
}

// Bias, activation, residual and FiLM of the sums, and where they go.
template <CudaActivation kActivation, typename T, int kPairs, int kProducts, int kBlocks>
__device__ inline void finish_as(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                                 const Sums<kPairs, kProducts, kBlocks>& sums, int block, Lane lane) {
    const int channels = layer.output_steps * kStepChannels;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const int channel = (block + n) * 8 + 2 * lane.quarter;
        const int step = (block + n) / 2, half = (block + n) % 2 * 4;
        float2 scale = {1.0f, 1.0f}, shift = {0.0f, 0.0f};
        if (layer.film) {
            scale = *reinterpret_cast<const float2*>(parameters + layer.parameters + channel);
            shift = *reinterpret_cast<const float2*>(parameters + layer.parameters + channels + channel);
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            float result[4], before[4] = {};
            const int index = record_index(pair, step, layer.output_steps, lane.index) + half;
            if (layer.residual >= 0) load4(at<T>(memory, layer.residual) + index, before);
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int row = layer.bias_per_joint ? (2 * pair + which) * channels : 0;
                const float2 bias = *reinterpret_cast<const float2*>(layer.bias + row + channel);
                const float* sum = sums.values[0][pair][n] + 2 * which;
                result[2 * which] = activate<kActivation>(sum[0] + bias.x) + before[2 * which];
                result[2 * which + 1] = activate<kActivation>(sum[1] + bias.y) + before[2 * which + 1];
            }
            if (layer.film) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    result[i] = silu(result[i] * (i % 2 ? scale.y : scale.x) + (i % 2 ? shift.y : shift.x));
                }
            }
            if (layer.output_is_float) {
                store4(at<float>(memory, layer.output) + index, result);
            } else {
                store4(at<T>(memory, layer.output) + index, result);
            }
        }
    }
}

// One piece of code for each activation: unrolled over all joints, all of them together would not fit the instruction
// cache.
template <typename T, int kPairs, int kProducts, int kBlocks>
__device__ inline void finish(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                              const Sums<kPairs, kProducts, kBlocks>& sums, int block, Lane lane) {
    if (layer.activation == CudaActivation::relu) {
        finish_as<CudaActivation::relu, T>(layer, memory, parameters, sums, block, lane);
    } else if (layer.activation == CudaActivation::gelu) {
        finish_as<CudaActivation::gelu, T>(layer, memory, parameters, sums, block, lane);
    } else {
        finish_as<CudaActivation::none, T>(layer, memory, parameters, sums, block, lane);
    }
}

// `kBlocks` blocks of eight columns of a product layer, by one warp.
template <typename T, int kPairs, int kProducts, int kBlocks>
__device__ inline void product_task(const LayerRecord& layer, unsigned char* memory, const float* parameters, int block,
                                    Lane lane) {
    Sums<kPairs, kProducts, kBlocks> sums;
    sums.clear();
    add_products(sums, at<const T>(memory, layer.input), static_cast<const T*>(layer.weight), block, 0,
                 layer.input_steps, layer.input_steps, lane);
    if constexpr (kProducts == 2) mix_joints(layer, sums, block, lane);
    finish<T>(layer, memory, parameters, sums, block, lane);
}

// --- Scale and shift -------------------------------------------------------------------------------------------------

// Sum over the four lanes that share a pose; all of them get it, in the same bits.
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
    const int steps = layer.input_steps;
    float mean[2] = {}, factor[2] = {1.0f, 1.0f}, record[kRecord];
    if (layer.normalize) {
        const float count = static_cast<float>(layer.channels);
        for (int step = 0; step < steps; ++step) {
            load8(x + record_index(pair, step, steps, lane.index), record);
#pragma unroll
            for (int i = 0; i < kRecord; ++i) mean[i / 2 % 2] += record[i];  // padded channels are 0
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) mean[which] = sum_over_quarters(mean[which]) / count;
        float squares[2] = {};
        for (int step = 0; step < steps; ++step) {
            load8(x + record_index(pair, step, steps, lane.index), record);
#pragma unroll
            for (int i = 0; i < kRecord; ++i) {
                const int channel = step * kStepChannels + 2 * lane.quarter + i / 4 * 8 + i % 2;
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
    const float* shift = scale + steps * kStepChannels;
    for (int step = 0; step < steps; ++step) {
        const int index = record_index(pair, step, steps, lane.index);
        load8(x + index, record);
#pragma unroll
        for (int i = 0; i < kRecord; ++i) {
            const int channel = step * kStepChannels + 2 * lane.quarter + i / 4 * 8 + i % 2;
            const int which = i / 2 % 2;
            const float value = (record[i] - mean[which]) * factor[which] * scale[channel] + shift[channel];
            record[i] = layer.normalize ? value : silu(value);
        }
        store8(y + index, record);
    }
}

// --- Attention -------------------------------------------------------------------------------------------------------

// softmax(q k^T) of one head, of two joints of all poses against all joints: weights [head][joint][joint][pose], padded
// joints included, which nobody attends to. The input holds the queries of all heads and then the keys.
template <typename T, int kPairs>
__device__ inline void attention_weights_task(const LayerRecord& layer, unsigned char* memory, int joints, int head,
                                              int pair, Lane lane) {
    const T* x = at<const T>(memory, layer.input);
    const int steps = layer.input_steps, head_steps = steps / 2 / layer.num_heads;
    float dots[2][2 * kPairs] = {};
    for (int step = head * head_steps; step < (head + 1) * head_steps; ++step) {
        float query[kRecord], key[kRecord];
        load8(x + record_index(pair, step, steps, lane.index), query);
#pragma unroll
        for (int other = 0; other < kPairs; ++other) {
            load8(x + record_index(other, step + steps / 2, steps, lane.index), key);
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
            // The four lanes of a pose hold the same numbers: each stores some of them.
            if (j % 4 == lane.quarter) row[j * kTilePoses] = dots[i][j] * factor;
        }
    }
}

// weights v of 16 channels.
template <typename T, int kPairs>
__device__ inline void attention_apply_task(const LayerRecord& layer, unsigned char* memory, int step, Lane lane) {
    const T* x = at<const T>(memory, layer.input);
    T* y = at<T>(memory, layer.output);
    const int steps = layer.output_steps, head = step / (steps / layer.num_heads);
    const float* weights = at<const float>(memory, layer.weights) + head * 4 * kPairs * kPairs * kTilePoses + lane.pose;
    float values[kPairs][kRecord];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) load8(x + record_index(pair, step, steps, lane.index), values[pair]);
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
        store8(y + record_index(pair, step, steps, lane.index), result);
    }
}

}  // namespace diffupose
