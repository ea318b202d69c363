// The products of split.cuh: their weights, and the sums of each pair of joints.
#pragma once

#include <type_traits>

#include "engine/cuda/fragments.cuh"
#include "engine/cuda/loads.cuh"

namespace diffupose {

// Poses spread evenly over pose tiles, since the time of a tile grows with its poses.
struct Tiling {
    int64_t poses;
    int each;

    __device__ int64_t first(unsigned tile) const { return int64_t{each} * tile; }
    // At least one.
    __device__ int count(unsigned tile) const {
        const int64_t left = poses - first(tile);
        return left < each ? static_cast<int>(left) : each;
    }
};

// The lane whose activations a lane reads. Lanes without a pose read those of the last pose, which costs nothing.
__device__ inline int lane_to_read(Lane lane, int poses) {
    return 4 * (lane.pose < poses ? lane.pose : poses - 1) + lane.quarter;
}

// Four numbers as they lie in memory, so that they take few registers until they are needed.
template <typename T>
struct Four {
    std::conditional_t<sizeof(T) == 2, uint2, uint4> words;

    __device__ void load(const T* from, bool there) {
        words = load_if(reinterpret_cast<const decltype(words)*>(from), there);
    }
    __device__ float operator[](int i) const {
        if constexpr (sizeof(T) == 2) {
            const uint32_t word = i < 2 ? words.x : words.y;
            return float_of(i % 2 ? word & 0xffff0000u : word << 16);
        } else {
            return float_of(i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w));
        }
    }
};

// Makes the compiler compute an address here, not where it is used.
template <typename T>
__device__ inline void compute_now([[maybe_unused]] T*& address) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(address));
#endif
}

// For each joint and lane, two channels of a pose.
template <int kPairs>
using JointTable = float2[2 * kPairs][kWarpSize];

// --- Products in bfloat16: a pair of joints for each warp ------------------------------------------------------------

// Channel blocks whose weights fit into shared memory. Weights of later ones are read from L2.
constexpr int kHeldBlocks = 32;
// Channel blocks between two checks whether there are more.
constexpr int kChunk = 4;

template <typename T, int kPairs, int kProducts, int kBlocks>
struct SplitProduct;

template <int kPairs, int kProducts, int kBlocks>
struct SplitProduct<Bfloat16, kPairs, kProducts, kBlocks> {
    // A lane's weights of a channel block and a block of columns.
    using Word = std::conditional_t<kProducts == 2, uint4, uint2>;
    // Channel blocks of activations in flight.
    static constexpr int kDepth = kBlocks == 1 ? 12 : 8;

    Word words[kBlocks][kHeldBlocks * kWarpSize];

    static __device__ const Word* words_of(const LayerRecord& layer, int block) {
        return static_cast<const Word*>(layer.weight) + block * layer.input_blocks * kWarpSize;
    }

    // Fetches weights. Zeros follow those of the last channel block, up to whole chunks.
    __device__ void hold(const LayerRecord& layer, int block, int thread) {
        constexpr int kThreads = kPairs * kWarpSize, kRounds = 4;
        static_assert(kHeldBlocks * kWarpSize <= kRounds * kThreads);
        const int there = layer.input_blocks * kWarpSize;
        const int channel_blocks = (layer.input_blocks + kChunk - 1) / kChunk * kChunk;
        const int all = (channel_blocks < kHeldBlocks ? channel_blocks : kHeldBlocks) * kWarpSize;
        Word some[kBlocks][kRounds];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int k = 0; k < kRounds; ++k) {
                const int i = thread + k * kThreads;
                some[n][k] = __ldg(words_of(layer, block + n) + (i < there ? i : there - 1));
            }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int k = 0; k < kRounds; ++k) {
                const int i = thread + k * kThreads;
                if (i < all) words[n][i] = i < there ? some[n][k] : Word{};
            }
        }
    }

    // Address of the first record that a lane multiplies.
    static __device__ const uint4* records(const LayerRecord& layer, const Bfloat16* x, int poses, int warp,
                                           Lane lane) {
        return reinterpret_cast<const uint4*>(x) + warp * layer.input_blocks * kWarpSize + lane_to_read(lane, poses);
    }

    // The sums of pair `warp` over all channels. The weights must have been fetched.
    __device__ void multiply(const LayerRecord& layer, const uint4* from, int block, int /* warp */, Lane lane,
                             float (&sums)[kBlocks][kProducts][4]) const {
        const int channel_blocks = layer.input_blocks,
                  held = channel_blocks < kHeldBlocks ? channel_blocks : kHeldBlocks;
        uint4 coming[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) coming[i] = load_if(from + i * kWarpSize, i < held);
        // Two sums in turn, so that a product seldom waits for the previous one.
        float two[2][kBlocks][kProducts][4] = {};
        const auto add = [&two](int which, int n, uint4 a, Word w) {
            diffupose::multiply(two[which][n][0], a, w.x, w.y);
            if constexpr (kProducts == 2) diffupose::multiply(two[which][n][1], a, w.z, w.w);
        };
        for (int first = 0; first < held; first += kDepth) {
            const uint4* next = from + (first + kDepth) * kWarpSize;
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                if (i % kChunk == 0 && first + i >= held) break;
#pragma unroll
                for (int n = 0; n < kBlocks; ++n) {
                    add(i % 2, n, coming[i], words[n][(first + i) * kWarpSize + lane.index]);
                }
                coming[i] = load_if(next + i * kWarpSize, first + i + kDepth < held);
            }
        }
        for (int channel_block = held; channel_block < channel_blocks; ++channel_block) {
            const uint4 a = __ldcg(from + channel_block * kWarpSize);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                add(0, n, a, __ldg(words_of(layer, block + n) + channel_block * kWarpSize + lane.index));
            }
        }
#pragma unroll
        for (int i = 0; i < kBlocks * kProducts * 4; ++i) {
            (&sums[0][0][0])[i] = (&two[0][0][0][0])[i] + (&two[1][0][0][0])[i];
        }
    }
};

// --- Products in float32: several pairs and a part of the channels for each warp -------------------------------------

template <int kPairs, int kProducts, int kBlocks>
struct SplitProduct<float, kPairs, kProducts, kBlocks> {
    // Each loaded weight is used for several pairs, so that loads do not limit the multiply-adds.
    static constexpr int kShare = kPairs % 3 == 0 ? 3 : 4;  // pairs of a warp, and parts of the channels
    static_assert(kPairs % kShare == 0);
    static constexpr int kAtOnce = 4 / (kBlocks == 1 ? 1 : 2 * kProducts);  // quarters of a channel block in flight

    JointTable<kPairs> parts[kShare][kProducts];

    __device__ void hold(const LayerRecord&, int, int) {}

    static __device__ const float* records(const LayerRecord& layer, const float* x, int poses, int warp, Lane lane) {
        return x + record_index(warp / kShare * kShare, 0, layer.input_blocks, lane_to_read(lane, poses) / 4 * 4);
    }

    __device__ void multiply(const LayerRecord& layer, const float* from_x, int block, int warp, Lane lane,
                             float (&sums)[kBlocks][kProducts][4]) {
        const int channel_blocks = layer.input_blocks, part = warp % kShare, first_pair = warp / kShare * kShare;
        const auto* weight = static_cast<const float*>(layer.weight);
        float own[kBlocks][kProducts][kShare][4] = {};
        for (int channel_block = channel_blocks * part / kShare; channel_block < channel_blocks * (part + 1) / kShare;
             ++channel_block) {
#pragma unroll kAtOnce
            for (int q = 0; q < 4; ++q) {
                float b[kBlocks][2][kProducts][4];
#pragma unroll
                for (int n = 0; n < kBlocks; ++n) {
                    const float* from =
                        weight + ((((block + n) * channel_blocks + channel_block) * 4 + q) * 4 + lane.quarter) * 2 *
                                     kProducts * 4;
#pragma unroll
                    for (int i = 0; i < 2 * kProducts; ++i) load4(from + 4 * i, b[n][i / kProducts][i % kProducts]);
                }
#pragma unroll
                for (int pair = 0; pair < kShare; ++pair) {
                    const float* record = from_x + record_index(pair, channel_block, channel_blocks, q);
                    Four<float> a[2];  // joints 0 and 1 of the lower channels, then of the upper ones
                    a[0].load(record, true), a[1].load(record + 4, true);
#pragma unroll
                    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                        for (int product = 0; product < kProducts; ++product) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) {  // joint i / 2, column i % 2
                                float& sum = own[n][product][pair][i];
                                const float* w = b[n][i % 2][product];
                                const int k = i / 2 * 2;
                                sum = fmaf(a[0][k], w[0], sum), sum = fmaf(a[0][k + 1], w[1], sum);
                                sum = fmaf(a[1][k], w[2], sum), sum = fmaf(a[1][k + 1], w[3], sum);
                            }
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            if (n > 0) __syncthreads();  // all have read the parts of the previous columns
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
#pragma unroll
                for (int i = 0; i < 2 * kShare; ++i) {
                    const float* sum = own[n][product][i / 2] + i % 2 * 2;
                    parts[part][product][2 * first_pair + i][lane.index] = {sum[0], sum[1]};
                }
            }
            __syncthreads();
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[n][product][i] = 0.0f;
#pragma unroll
                for (int other = 0; other < kShare; ++other) {
#pragma unroll
                    for (int which = 0; which < 2; ++which) {
                        const float2 two = parts[other][product][2 * warp + which][lane.index];
                        sums[n][product][2 * which] += two.x, sums[n][product][2 * which + 1] += two.y;
                    }
                }
            }
        }
    }
};

}  // namespace diffupose
