// A product layer cut into small pieces, for few poses, where latency counts and no multiprocessor has enough to do.
//
// A block takes some columns of a pose tile, with a warp for each pair of joints. Before it waits for earlier kernels
// it fetches what they do not write: weights, factors, adjacency and the step's parameters (see common/cuda.h). Then
// each warp keeps many loads of activations in flight. At the end each warp mixes the joints of its pair and stores
// them.
//
// The numbers of a pose do not depend on the columns of the block, nor on the number of poses.
#pragma once

#include "engine/cuda/finish.cuh"
#include "engine/cuda/layers/split_products.cuh"

namespace diffupose {

// Factors that the end of a layer needs for the block's columns. They lie in shared memory, since activations need the
// registers.
template <int kPairs, int kBlocks>
struct SplitFactors {
    static constexpr int kColumns = 8 * kBlocks;
    alignas(16) float adjacency[2 * kPairs * kAdjacencyStride];
    alignas(8) float own[2 * kPairs * kColumns], neighbors[2 * kPairs * kColumns], bias[2 * kPairs * kColumns];
    alignas(8) float scale[kColumns], shift[kColumns];
};

__device__ inline float2 two_of(const float* row, int block, Lane lane) {
    return *reinterpret_cast<const float2*>(row + 8 * block + 2 * lane.quarter);
}

// own * H0 + A (neighbors * H1) of a pair, in place of H0. Warps exchange neighbors * H1 through `others`.
template <int kPairs, int kBlocks>
__device__ inline void mix_pair(const SplitFactors<kPairs, kBlocks>& factors, JointTable<kPairs> (&others)[kBlocks],
                                float (&sums)[kBlocks][2][4], int pair, Lane lane) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int joint = 2 * pair + which;
            float* mine = sums[n][0] + 2 * which;
            const float* other = sums[n][1] + 2 * which;
            const float2 factor = two_of(factors.own + joint * factors.kColumns, n, lane);
            const float2 modulation = two_of(factors.neighbors + joint * factors.kColumns, n, lane);
            mine[0] *= factor.x, mine[1] *= factor.y;
            others[n][joint][lane.index] = {other[0] * modulation.x, other[1] * modulation.y};
        }
    }
    __syncthreads();
#pragma unroll
    for (int four = 0; four < (2 * kPairs + 3) / 4; ++four) {
        float a[2][4];
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            load4(factors.adjacency + (2 * pair + which) * kAdjacencyStride + 4 * four, a[which]);
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int j = 4 * four; j < 4 * four + 4 && j < 2 * kPairs; ++j) {
                const float2 other = others[n][j][lane.index];
#pragma unroll
                for (int which = 0; which < 2; ++which) {
                    float* mine = sums[n][0] + 2 * which;
                    mine[0] = fmaf(a[which][j % 4], other.x, mine[0]);
                    mine[1] = fmaf(a[which][j % 4], other.y, mine[1]);
                }
            }
        }
    }
}

// Bias, activation, residual and FiLM of a pair's sums, in place.
template <Activation kActivation, typename T, int kPairs, int kProducts, int kBlocks>
__device__ inline void finish_pair(bool has_film, const SplitFactors<kPairs, kBlocks>& factors,
                                   const Four<T> (&before)[kBlocks], float (&sums)[kBlocks][kProducts][4], int pair,
                                   Lane lane) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 bias = two_of(factors.bias + (2 * pair + i / 2) * factors.kColumns, n, lane);
            float value = finish<kActivation>(sums[n][0][i], i % 2 ? bias.y : bias.x, before[n][i]);
            if (has_film) {
                const float2 scale = two_of(factors.scale, n, lane), shift = two_of(factors.shift, n, lane);
                value = film(value, i % 2 ? scale.y : scale.x, i % 2 ? shift.y : shift.x);
            }
            sums[n][0][i] = value;
        }
    }
}

template <typename T, int kProducts, int kBlocks>
__device__ inline void store_pair(T* to, const float (&sums)[kBlocks][kProducts][4]) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) store4(to + 4 * n, sums[n][0]);
}
template <int kProducts>
__device__ inline void store_pair(Bfloat16* to, const float (&sums)[2][kProducts][4]) {
    float record[kRecord];
#pragma unroll
    for (int i = 0; i < kRecord; ++i) record[i] = sums[i / 4][0][i % 4];
    store8(to, record);
}

template <typename T, int kPairs, int kProducts, int kBlocks>
struct SplitLayer {
    using Product = SplitProduct<T, kPairs, kProducts, kBlocks>;
    using Factors = SplitFactors<kPairs, kBlocks>;
    Product product;
    Factors factors;
    JointTable<kPairs> others[kProducts == 2 ? kBlocks : 1];

    // Fetches what earlier kernels do not write. All loads are issued before the first store.
    __device__ void hold(const LayerRecord& layer, const float* parameters, int block, int thread) {
        constexpr int kThreads = kPairs * kWarpSize, kColumns = Factors::kColumns, kNumbers = 2 * kPairs * kColumns;
        constexpr int kAdjacency = 2 * kPairs * kAdjacencyStride, kRounds = (kAdjacency + kThreads - 1) / kThreads;
        static_assert(kNumbers <= kThreads);
        const int i = thread < kNumbers ? thread : kNumbers - 1;
        const int channels = layer.output_blocks * kChannelBlock, column = 8 * block + i % kColumns;
        const int number = i / kColumns * channels + column;
        float adjacency[kRounds], own, neighbors;
        if constexpr (kProducts == 2) {
#pragma unroll
            for (int k = 0; k < kRounds; ++k) {
                const int at = thread + k * kThreads;
                adjacency[k] = __ldg(layer.adjacency + (at < kAdjacency ? at : 0));
            }
            own = __ldg(layer.own + number), neighbors = __ldg(layer.neighbors + number);
        }
        const float bias = __ldg(layer.bias + (layer.bias_per_joint ? number : column));
        // Without FiLM the bias is read in place of scale and shift, and not used.
        const float* film = layer.film ? parameters + layer.parameters : layer.bias;
        const float scale = __ldg(film + column), shift = __ldg(film + column + (layer.film ? channels : 0));
        product.hold(layer, block, thread);
        if constexpr (kProducts == 2) {
#pragma unroll
            for (int k = 0; k < kRounds; ++k) {
                const int at = thread + k * kThreads;
                if (at < kAdjacency) factors.adjacency[at] = adjacency[k];
            }
        }
        if (thread < kNumbers) {
            if constexpr (kProducts == 2) factors.own[i] = own, factors.neighbors[i] = neighbors;
            factors.bias[i] = bias;
        }
        if (thread < kColumns) factors.scale[i] = scale, factors.shift[i] = shift;
    }

    // `kBlocks` blocks of eight columns of a pose tile. `block`, the first of them, is a multiple of `kBlocks`.
    __device__ void run(const LayerRecord& layer, unsigned char* memory, const float* parameters, int block, int poses,
                        int warp, Lane lane) {
        const auto index = [&](int of_lane) {
            return record_index(warp, block / 2, layer.output_blocks, of_lane) + block % 2 * 4;
        };
        // A lane reads the residual of its own pose only, since the output may lie in its place.
        const bool has_residual = layer.residual >= 0 && lane.pose < poses;
        hold(layer, parameters, block, warp * kWarpSize + lane.index);
        const auto* from = Product::records(layer, at<const T>(memory, layer.input), poses, warp, lane);
        const T* residual = at<const T>(memory, has_residual ? layer.residual : 0) + index(lane.index);
        compute_now(from), compute_now(residual);
        __syncthreads();
        wait_for_earlier_kernels();

        Four<T> before[kBlocks];
        const auto load_residual = [&] {
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) before[n].load(residual + 4 * n, has_residual);
        };
        // Before the products, unless they need the registers.
        constexpr bool kEarly = sizeof(T) == 2 || kBlocks == 1;
        if constexpr (kEarly) load_residual();
        float sums[kBlocks][kProducts][4];
        product.multiply(layer, from, block, warp, lane, sums);
        if constexpr (!kEarly) load_residual();
        if constexpr (kProducts == 2) mix_pair(factors, others, sums, warp, lane);
        with_activation(layer.activation, [&](auto activation) {
            finish_pair<decltype(activation)::value>(layer.film, factors, before, sums, warp, lane);
        });
        if (lane.pose >= poses) return;
        if (layer.output_is_float) {
            store_pair(at<float>(memory, layer.output) + index(lane.index), sums);
        } else {
            store_pair(at<T>(memory, layer.output) + index(lane.index), sums);
        }
    }
};

}  // namespace diffupose
