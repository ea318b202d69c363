// A product layer of the persistent kernel by `mma`: a warp takes a block of columns of all joints of a tile.
#pragma once

#include "engine/cuda/finish.cuh"
#include "engine/cuda/fragments.cuh"

namespace diffupose {

// Sums of `kBlocks` blocks of eight columns. The last four are the result of the matrix instruction: channels 2t and
// 2t + 1 of joint 2 pair, then of joint 2 pair + 1.
template <int kPairs, int kProducts, int kBlocks>
struct Sums {
    float values[kProducts][kPairs][kBlocks][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < kProducts * kPairs * kBlocks * 4; ++i) (&values[0][0][0][0])[i] = 0.0f;
    }
};

// A lane's weights of a channel block.
template <int kProducts, int kBlocks>
struct Weights {
    uint32_t words[kBlocks][kProducts][2];

    // Blocks of columns are `channel_blocks` channel blocks apart.
    __device__ void load(const Bfloat16* weight, int block, int channel_block, int channel_blocks, Lane lane) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            const Bfloat16* from =
                weight + (((block + n) * channel_blocks + channel_block) * kWarpSize + lane.index) * kProducts * 4;
            if constexpr (kProducts == 2) {
                const uint4 four = __ldg(reinterpret_cast<const uint4*>(from));
                words[n][0][0] = four.x, words[n][0][1] = four.y, words[n][1][0] = four.z, words[n][1][1] = four.w;
            } else {
                const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
                words[n][0][0] = two.x, words[n][0][1] = two.y;
            }
        }
    }
};

// Adds the products of all channel blocks to the sums. `x` is the input buffer.
template <int kPairs, int kProducts, int kBlocks>
__device__ inline void add_products(Sums<kPairs, kProducts, kBlocks>& sums, const Bfloat16* x, const Bfloat16* weight,
                                    int block, int channel_blocks, Lane lane) {
    Weights<kProducts, kBlocks> next;
    if (channel_blocks > 0) next.load(weight, block, 0, channel_blocks, lane);  // always; without `if` more is spilled
    for (int channel_block = 0; channel_block < channel_blocks; ++channel_block) {
        const auto now = next;
        // The next weights are in flight while these are used.
        if (channel_block + 1 < channel_blocks) next.load(weight, block, channel_block + 1, channel_blocks, lane);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            const uint4 a =
                *reinterpret_cast<const uint4*>(x + record_index(pair, channel_block, channel_blocks, lane.index));
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    multiply(sums.values[product][pair][n], a, now.words[n][product][0], now.words[n][product][1]);
                }
            }
        }
    }
}

// own * H0 + A (neighbors * H1), in place of H0.
template <int kPairs, int kBlocks>
__device__ inline void mix_joints(const LayerRecord& layer, Sums<kPairs, 2, kBlocks>& sums, int block, Lane lane) {
    const int channels = layer.output_blocks * kChannelBlock;
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

// Applies bias, activation, residual and FiLM to the sums, and stores them.
template <Activation kActivation, int kPairs, int kProducts, int kBlocks>
__device__ inline void finish_sums(const LayerRecord& layer, unsigned char* memory, const float* parameters,
                                   const Sums<kPairs, kProducts, kBlocks>& sums, int block, Lane lane) {
    const int channels = layer.output_blocks * kChannelBlock;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const int channel = (block + n) * 8 + 2 * lane.quarter;
        const int channel_block = (block + n) / 2, half = (block + n) % 2 * 4;
        float2 scale = {1.0f, 1.0f}, shift = {0.0f, 0.0f};
        if (layer.film) {
            scale = *reinterpret_cast<const float2*>(parameters + layer.parameters + channel);
            shift = *reinterpret_cast<const float2*>(parameters + layer.parameters + channels + channel);
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            float result[4], before[4] = {};
            const int index = record_index(pair, channel_block, layer.output_blocks, lane.index) + half;
            if (layer.residual >= 0) load4(at<Bfloat16>(memory, layer.residual) + index, before);
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int row = layer.bias_per_joint ? (2 * pair + which) * channels : 0;
                const float2 bias = *reinterpret_cast<const float2*>(layer.bias + row + channel);
                const float* sum = sums.values[0][pair][n] + 2 * which;
                result[2 * which] = finish<kActivation>(sum[0], bias.x, before[2 * which]);
                result[2 * which + 1] = finish<kActivation>(sum[1], bias.y, before[2 * which + 1]);
            }
            if (layer.film) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    result[i] = film(result[i], i % 2 ? scale.y : scale.x, i % 2 ? shift.y : shift.x);
                }
            }
            if (layer.output_is_float) {
                store4(at<float>(memory, layer.output) + index, result);
            } else {
                store4(at<Bfloat16>(memory, layer.output) + index, result);
            }
        }
    }
}

// `kBlocks` blocks of eight columns of a product layer. One warp runs it.
template <int kPairs, int kProducts, int kBlocks>
__device__ inline void product_task(const LayerRecord& layer, unsigned char* memory, const float* parameters, int block,
                                    Lane lane) {
    Sums<kPairs, kProducts, kBlocks> sums;
    sums.clear();
    add_products(sums, at<const Bfloat16>(memory, layer.input), static_cast<const Bfloat16*>(layer.weight), block,
                 layer.input_blocks, lane);
    if constexpr (kProducts == 2) mix_joints(layer, sums, block, lane);
    with_activation(layer.activation, [&](auto activation) {
        finish_sums<decltype(activation)::value>(layer, memory, parameters, sums, block, lane);
    });
}

}  // namespace diffupose
