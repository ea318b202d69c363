// A product layer cut small, for few poses, where no multiprocessor has enough to do and latency is all that counts.
//
// A block takes some columns of a tile with as many warps as there are pairs of joints. What earlier kernels do not
// write (weights, factors, adjacency, parameters of the step) it fetches before it waits for them, see common/cuda.h.
// Then each warp has many loads of activations on their way at once, and at the end a pair of joints: all warps mix
// joints and store.
//
// A pose's numbers depend neither on the columns that a block takes nor on how many poses there are.
#pragma once

#include <type_traits>

#include "engine/cuda/loads.cuh"
#include "engine/cuda/pair_tasks.cuh"

namespace diffupose {

// Poses spread evenly over tiles: a tile takes as long as its poses are many.
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

// The lane whose activations a lane reads: where there is no pose, those of the last one, which cost nothing.
__device__ inline int lane_to_read(Lane lane, int poses) {
    return 4 * (lane.pose < poses ? lane.pose : poses - 1) + lane.quarter;
}

// Four numbers as they lie in memory, in few registers until they are needed.
template <typename T>
struct Four {
    std::conditional_t<sizeof(T) == 2, uint2, uint4> words;

    __device__ void load(const T* from, bool there) {
        words = load_if(reinterpret_cast<const decltype(words)*>(from), there);
    }
    __device__ float operator[](int i) const {
        if constexpr (sizeof(T) == 2) {
            const uint32_t word = i < 2 ? words.x : words.y;
            return to_float(i % 2 ? word & 0xffff0000u : word << 16);
        } else {
            return to_float(i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w));
        }
    }
};

// Has the compiler compute an address here rather than where it is used.
template <typename T>
__device__ inline void compute_now([[maybe_unused]] T*& address) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(address));
#endif
}

// Joint by joint, two channels of a pose for each lane.
template <int kPairs>
using JointTable = float2[2 * kPairs][kWarpSize];

// --- Products in bfloat16: a pair of joints for each warp ------------------------------------------------------------

// Steps whose weights fit into shared memory; those of more are read where they lie.
constexpr int kHeldSteps = 32;
// Steps between two looks at whether there are more.
constexpr int kChunk = 4;

template <typename T, int kPairs, int kProducts, int kBlocks>
struct SplitProduct;

template <int kPairs, int kProducts, int kBlocks>
struct SplitProduct<Bfloat16, kPairs, kProducts, kBlocks> {
    // What a lane holds of the weights of a step and a block of columns.
    using Word = std::conditional_t<kProducts == 2, uint4, uint2>;
    // Steps of activations that are on their way at once.
    static constexpr int kDepth = kBlocks == 1 ? 12 : 8;

    Word words[kBlocks][kHeldSteps * kWarpSize];

    static __device__ const Word* words_of(const LayerRecord& layer, int block) {
        return static_cast<const Word*>(layer.weight) + block * layer.input_steps * kWarpSize;
    }

    // Fetches weights, with zeros behind the last step, up to whole chunks.
    __device__ void hold(const LayerRecord& layer, int block, int thread) {
        constexpr int kThreads = kPairs * kWarpSize, kRounds = 4;
        static_assert(kHeldSteps * kWarpSize <= kRounds * kThreads);
        const int there = layer.input_steps * kWarpSize;
        const int steps = (layer.input_steps + kChunk - 1) / kChunk * kChunk;
        const int all = (steps < kHeldSteps ? steps : kHeldSteps) * kWarpSize;
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

    // The first of the records that a lane multiplies.
    static __device__ const uint4* records(const LayerRecord& layer, const Bfloat16* x, int poses, int warp,
                                           Lane lane) {
        return reinterpret_cast<const uint4*>(x) + warp * layer.input_steps * kWarpSize + lane_to_read(lane, poses);
    }

    // The sums of pair `warp` of all channels, once the weights are there.
    __device__ void multiply(const LayerRecord& layer, const uint4* from, int block, int /* warp */, Lane lane,
                             float (&sums)[kBlocks][kProducts][4]) const {
        const int steps = layer.input_steps, held = steps < kHeldSteps ? steps : kHeldSteps;
        uint4 coming[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) coming[i] = load_if(from + i * kWarpSize, i < held);
        // Two sums, so that a product seldom waits for the one before.
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
        for (int step = held; step < steps; ++step) {
            const uint4 a = __ldcg(from + step * kWarpSize);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                add(0, n, a, __ldg(words_of(layer, block + n) + step * kWarpSize + lane.index));
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
    // By multiply-adds weights are worth most where they are used for several pairs.
    static constexpr int kShare = kPairs % 3 == 0 ? 3 : 4;  // pairs of a warp, and parts of the channels
    static_assert(kPairs % kShare == 0);
    static constexpr int kAtOnce = 4 / (kBlocks == 1 ? 1 : 2 * kProducts);  // quarters of a step on their way at once

    JointTable<kPairs> parts[kShare][kProducts];

    __device__ void hold(const LayerRecord&, int, int) {}

    static __device__ const float* records(const LayerRecord& layer, const float* x, int poses, int warp, Lane lane) {
        return x + record_index(warp / kShare * kShare, 0, layer.input_steps, lane_to_read(lane, poses) / 4 * 4);
    }

    __device__ void multiply(const LayerRecord& layer, const float* from_x, int block, int warp, Lane lane,
                             float (&sums)[kBlocks][kProducts][4]) {
        const int steps = layer.input_steps, part = warp % kShare, first_pair = warp / kShare * kShare;
        const auto* weight = static_cast<const float*>(layer.weight);
        float own[kBlocks][kProducts][kShare][4] = {};
        for (int step = steps * part / kShare; step < steps * (part + 1) / kShare; ++step) {
#pragma unroll kAtOnce
            for (int q = 0; q < 4; ++q) {
                float b[kBlocks][2][kProducts][4];
#pragma unroll
                for (int n = 0; n < kBlocks; ++n) {
                    const float* from =
                        weight + ((((block + n) * steps + step) * 4 + q) * 4 + lane.quarter) * 2 * kProducts * 4;
#pragma unroll
                    for (int i = 0; i < 2 * kProducts; ++i) load4(from + 4 * i, b[n][i / kProducts][i % kProducts]);
                }
#pragma unroll
                for (int pair = 0; pair < kShare; ++pair) {
                    const float* record = from_x + record_index(pair, step, steps, q);
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
            if (n > 0) __syncthreads();  // all have read the parts of the columns before
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

// --- The whole layer -------------------------------------------------------------------------------------------------

// What the end of a layer needs of the block's columns. In shared memory: registers are wanted for activations.
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

// own * H0 + A (neighbors * H1) of a pair, in place of H0. `others` is for what warps tell each other.
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
template <CudaActivation kActivation, typename T, int kPairs, int kProducts, int kBlocks>
__device__ inline void finish_pair(bool film, const SplitFactors<kPairs, kBlocks>& factors,
                                   const Four<T> (&before)[kBlocks], float (&sums)[kBlocks][kProducts][4], int pair,
                                   Lane lane) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 bias = two_of(factors.bias + (2 * pair + i / 2) * factors.kColumns, n, lane);
            float value = activate<kActivation>(sums[n][0][i] + (i % 2 ? bias.y : bias.x)) + before[n][i];
            if (film) {
                const float2 scale = two_of(factors.scale, n, lane), shift = two_of(factors.shift, n, lane);
                value = silu(value * (i % 2 ? scale.y : scale.x) + (i % 2 ? shift.y : shift.x));
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

    // What earlier kernels do not write: everything is asked for before anything is stored.
    __device__ void hold(const LayerRecord& layer, const float* parameters, int block, int thread) {
        constexpr int kThreads = kPairs * kWarpSize, kColumns = Factors::kColumns, kNumbers = 2 * kPairs * kColumns;
        constexpr int kAdjacency = 2 * kPairs * kAdjacencyStride, kRounds = (kAdjacency + kThreads - 1) / kThreads;
        static_assert(kNumbers <= kThreads);
        const int i = thread < kNumbers ? thread : kNumbers - 1;
        const int channels = layer.output_steps * kStepChannels, column = 8 * block + i % kColumns;
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
        // Without scale and shift something else is read, and never used.
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

    // `kBlocks` blocks of eight columns of a tile, the first of which is a multiple of `kBlocks`.
    __device__ void run(const LayerRecord& layer, unsigned char* memory, const float* parameters, int block, int poses,
                        int warp, Lane lane) {
        const auto index = [&](int of_lane) {
            return record_index(warp, block / 2, layer.output_steps, of_lane) + block % 2 * 4;
        };
        // Only of this lane's pose: who writes it may overwrite it.
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
        // Early, unless it would take registers that the products need.
        constexpr bool kEarly = sizeof(T) == 2 || kBlocks == 1;
        if constexpr (kEarly) load_residual();
        float sums[kBlocks][kProducts][4];
        product.multiply(layer, from, block, warp, lane, sums);
        if constexpr (!kEarly) load_residual();
        if constexpr (kProducts == 2) mix_pair(factors, others, sums, warp, lane);
        if (layer.activation == CudaActivation::relu) {
            finish_pair<CudaActivation::relu>(layer.film, factors, before, sums, warp, lane);
        } else if (layer.activation == CudaActivation::gelu) {
            finish_pair<CudaActivation::gelu>(layer.film, factors, before, sums, warp, lane);
        } else {
            finish_pair<CudaActivation::none>(layer.film, factors, before, sums, warp, lane);
        }
        if (lane.pose >= poses) return;
        if (layer.output_is_float) {
            store_pair(at<float>(memory, layer.output) + index(lane.index), sums);
        } else {
            store_pair(at<T>(memory, layer.output) + index(lane.index), sums);
        }
    }
};

}  // namespace diffupose
