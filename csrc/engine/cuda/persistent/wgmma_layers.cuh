// The product layers of a pose tile by two warpgroups of Hopper, with its activations in shared memory.
//
// Products are transposed: rows are output channels, columns joints times poses. So 17 joints are 136 columns, a width
// that the instruction has. Weights are operand A, and go from L2 to the registers that use them. A thread holds all
// joints of its channels and poses, so the product with the adjacency needs no exchange between threads.
//
// Activations are [joint][channel][pose 8]. Eight channels of a joint are a core matrix of operand B. Weights are
// [block of 64 channels][channel block][product][warp][lane][8], the registers of operand A (wgmma.cuh), with 2
// products for a graph convolution and 1 for a linear layer. Zeros pad channel blocks to whole rounds, and
// kWgmmaBlocksAhead more channel blocks follow the last block. Factors (`own`, `neighbors`) are
// [channel block][half][four joints][channel 8][4]. In the transposed adjacency a row holds a neighbour's weights in
// all joints.
//
// The warpgroups take turns: while one multiplies a block of 64 channels, the other mixes the joints of the previous
// block and stores them. Turns are counted through all layers of all steps. The first block of a layer is multiplied
// while the last block of the previous layer is stored, up to the channels that it needs from there.
#pragma once

#include "engine/cuda/finish.cuh"
#include "engine/cuda/persistent/wgmma.cuh"

namespace diffupose {

constexpr int kWgmmaWarps = kBlockThreads / kWarpSize;
constexpr int kGroupBlocks = kGroupRows / kChannelBlock;  // channel blocks of the next layer's input in a block
// Channel blocks whose weights a thread holds: one is multiplied, the others are in flight. As many as a block has, so
// that the last block of the previous layer is needed in the last round only.
constexpr int kRing = kGroupBlocks, kRound = kWgmmaRoundBlocks;
static_assert(kRing == kWgmmaBlocksAhead + 1 && kRound % kRing == 0);
// Numbers of barriers: 1 and 2 for the turns of the two warpgroups, 3 for the last block of a layer.
constexpr int kTurnBarrier = 1, kLayerBarrier = 3;

struct WgmmaLayout {
    __device__ static int index(int joint, int pose, int channel, int channel_blocks) {
        return (joint * channel_blocks * kChannelBlock + channel) * kTilePoses + pose;
    }
};

// A thread's position: it holds channel `row` of eight, of poses 2 `quarter` and the next. Eight channels of all poses
// are 128 consecutive bytes.
struct Place {
    int group, warp, row, quarter;  // the warp within its group
};

__device__ inline Place this_place() {
#ifdef DIFFUPOSE_WGMMA
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
#else
    const int thread = static_cast<int>(threadIdx.x);
#endif
    const int lane = thread % kWarpSize;
    return {thread / kGroupThreads, thread % kGroupThreads / kWarpSize, lane / 4, lane % 4};
}

// The parameters of a step. Their address is computed at each use, so that it occupies no register.
struct Parameters {
    const CudaSampleArgs& args;
    int step;
    __device__ const float* get() const { return args.parameters + step * args.num_parameters; }
};

// Numbers of poses 2 `quarter` and the next.
__device__ inline float2 unpack_bfloat16(uint32_t word) {
    return make_float2(float_of(word << 16), float_of(word & 0xffff0000u));
}
__device__ inline float2 load_poses(const Bfloat16* from) {
    return unpack_bfloat16(*reinterpret_cast<const uint32_t*>(from));
}
__device__ inline float2 load_poses(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ inline void store_poses(Bfloat16* to, float2 value) {
    *reinterpret_cast<uint32_t*>(to) = pack_bfloat16(value.x, value.y);
}
__device__ inline void store_poses(float* to, float2 value) { *reinterpret_cast<float2*>(to) = value; }

// --- Graph convolutions and linear layers ----------------------------------------------------------------------------

// A thread's weights of a channel block.
template <int kProducts>
struct BlockWeights {
    uint4 of[kProducts];

    // Weights are read once, and must not evict from L1 what is read repeatedly.
    __device__ void load(const uint4* weight) {
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            const uint4* from = weight + product * kGroupThreads;
#ifdef DIFFUPOSE_WGMMA
            asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                         : "=r"(of[product].x), "=r"(of[product].y), "=r"(of[product].z), "=r"(of[product].w)
                         : "l"(from));
#else
            of[product] = *from;
#endif
        }
    }
};

// Sums of a block: channel row, then channel row + 8, of two poses of every joint.
template <int kJoints, int kProducts>
struct GroupSums {
    float values[kProducts][4 * kJoints];
};

// Rounds of the ring that a layer takes. Channel blocks after the last one have weights of zero.
__device__ inline int rounds_of(int channel_blocks) { return (channel_blocks + kRound - 1) / kRound; }

// Issues the products of all channel blocks; the caller waits for their end. `weight` is this thread's address in the
// block. If `layer_before`, the group waits in the last round until the previous layer has been stored.
//
// After a branch the compiler waits for all outstanding weight loads, so the round has none.
template <int kJoints, int kProducts>
__device__ inline void add_group_products(GroupSums<kJoints, kProducts>& sums, const void* x, const uint4* weight,
                                          int channel_blocks, int group, bool layer_before) {
    BlockWeights<kProducts> ring[kRing];
    const int rounds = rounds_of(channel_blocks);
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) ring[i].load(weight + i * kProducts * kGroupThreads);
    const uint4* next = weight + (kRing - 1) * kProducts * kGroupThreads;
    // Instead, the first product could overwrite the sums. But then the compiler would keep the registers of the
    // previous block's sums, as if the product read them.
#pragma unroll
    for (int i = 0; i < kProducts * 4 * kJoints; ++i) (&sums.values[0][0])[i] = 0.0f;
    const uint64_t b = describe(x, channel_blocks * kChannelBlock * kTilePoses * 2);
    sync_barrier(kTurnBarrier + group);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        if (layer_before && round + 1 == rounds) sync_barrier(kLayerBarrier);
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
            // Weights of zero must be multiplied by finite activations, so by those of the last channel block.
            const int here = round * kRound + i, channel_block = here < channel_blocks ? here : channel_blocks - 1;
            begin_products();
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
                multiply_group<kJoints>(sums.values[product], ring[i % kRing].of[product],
                                        advance(b, channel_block * kChannelBlock * kTilePoses * 2));
            }
            commit_products();
            // The products of the previous channel block are done, so its weights can be replaced. The loads after the
            // last ones read weights of the next block, which are not used.
            wait_for_products<1>();
            ring[(i + kRing - 1) % kRing].load(next);
            next += kProducts * kGroupThreads;
        }
    }
    arrive_at_barrier(kTurnBarrier + 1 - group);
}

// Loads a row of the adjacency.
template <int kJoints>
__device__ inline void load_row(const float* adjacency, int joint, float* row) {
#pragma unroll
    for (int i = 0; i < kJoints; i += 4) load4(adjacency + joint * kAdjacencyStride + i, row + i);
}

// The compiler moves no load across it. Otherwise it would load everything at once and run out of registers.
__device__ inline void keep_order() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("bar.warp.sync 0xffffffff;\n" ::: "memory");
#endif
}

// Hides how a number was computed. Otherwise the compiler would keep values derived from a counter in more registers.
__device__ inline void hide_from_compiler(int& number) {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("" : "+r"(number));
#else
    (void)number;
#endif
}

// Factors of four joints, of channel row and of channel row + 8.
struct FourFactors {
    float of[2][4];

    __device__ void load(const float* from, int half) { load4(from, of[0]), load4(from + half, of[1]); }
};

// Factors that the end of a block reads from L2. The first are loaded while the last products run, the others shortly
// before their use.
template <int kJoints>
struct Factors {
    static constexpr int kFours = (kJoints + 3) / 4, kFour = 8 * 4;  // factors of four joints, eight channels
    static constexpr int kEarly = kJoints == 17 ? 3 : 4;             // loaded before the products end; more would spill
    FourFactors own[kFours], neighbors[2];                           // of these only those in use or in flight
    const LayerRecord& layer;
    int begin;

    // `channel_block` is that of the warp's channels.
    __device__ Factors(const LayerRecord& layer, int channel_block, Place place)
        : layer(layer), begin(channel_block * 2 * kFours * kFour + place.row * 4) {}
    __device__ void load_early() {
#pragma unroll
        for (int four = 0; four < kEarly; ++four) own[four].load(layer.own + begin + four * kFour, kFours * kFour);
    }
    __device__ void load_late() {
#pragma unroll
        for (int four = kEarly; four < kFours; ++four) own[four].load(layer.own + begin + four * kFour, kFours * kFour);
    }
    __device__ void load_neighbors(int four) {
        neighbors[four % 2].load(layer.neighbors + begin + four * kFour, kFours * kFour);
    }
};

// own * H0 + A (neighbors * H1), in place of H0. The loop runs over neighbours, so that the registers of each can be
// reused after its turn. `adjacency` lies in shared memory.
template <int kJoints>
__device__ inline void mix_joints(const float* adjacency, GroupSums<kJoints, 2>& sums, Factors<kJoints>& factors) {
    constexpr int kFours = Factors<kJoints>::kFours;
    float* own = sums.values[0];
#pragma unroll
    for (int i = 0; i < 4 * kJoints; ++i) {
        if (i == 0) keep_order(), factors.load_late();
        if (i == 16) keep_order(), factors.load_neighbors(0);
        own[i] *= factors.own[i / 16].of[i / 2 % 2][i / 4 % 4];
    }
    float weights[2][4 * kFours];  // a neighbour's weights in all joints
    load_row<kJoints>(adjacency, 0, weights[0]);
#pragma unroll
    for (int neighbor = 0; neighbor < kJoints; ++neighbor) {
        keep_order();
        if (neighbor + 1 < kJoints) load_row<kJoints>(adjacency, neighbor + 1, weights[(neighbor + 1) % 2]);
        if (neighbor % 4 == 0 && neighbor + 4 < kJoints) factors.load_neighbors(neighbor / 4 + 1);
        float other[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            other[i] = sums.values[1][4 * neighbor + i] * factors.neighbors[neighbor / 4 % 2].of[i / 2][neighbor % 4];
        }
#pragma unroll
        for (int joint = 0; joint < kJoints; ++joint) {
            if (joint == neighbor) continue;  // the diagonal is in `own`
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                own[4 * joint + i] = fmaf(weights[neighbor % 2][joint], other[i], own[4 * joint + i]);
            }
        }
    }
}

// Each has its own code, without a branch over all joints. The exception is the branch for FiLM after GELU.
enum class Finish { plain, film, gelu };

// Biases of channel row and channel row + 8 of a warp's 16 channels, for every joint if a linear layer has a bias per
// joint.
template <int kJoints, int kProducts>
struct Biases {
    static constexpr int kCount = kProducts == 1 ? kJoints : 1;
    float of[kCount][2];

    __device__ void load(const LayerRecord& layer, int channel_block, Place place) {
        const float* from = layer.bias + channel_block * kChannelBlock + place.row;
        const int next = kProducts == 1 && layer.bias_per_joint ? layer.output_blocks * kChannelBlock : 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) of[i][0] = from[i * next], of[i][1] = from[i * next + 8];
    }
};

// Applies bias, activation, residual and FiLM to a warp's 16 channels, and stores them. The record is read before the
// loop, since the compiler cannot know that the stores leave it unchanged.
template <Finish kFinish, int kJoints, int kProducts>
__device__ inline void finish_block(const LayerRecord& layer, unsigned char* memory, Parameters parameters,
                                    GroupSums<kJoints, kProducts>& sums, const Biases<kJoints, kProducts>& biases,
                                    int channel_block, Place place) {
    const int channels = layer.output_blocks * kChannelBlock, first = channel_block * kChannelBlock + place.row;
    const bool has_film = kFinish == Finish::film || (kFinish == Finish::gelu && layer.film);
    const bool is_float = layer.output_is_float, has_residual = layer.residual >= 0;
    const float lowest = lowest_of(layer.activation);
    float scale[2] = {}, shift[2] = {};
    if (has_film) {
        const float* at_channel = parameters.get() + layer.parameters + first;
        scale[0] = at_channel[0], scale[1] = at_channel[8];
        shift[0] = at_channel[channels], shift[1] = at_channel[channels + 8];
    }
    int index = WgmmaLayout::index(0, 2 * place.quarter, first, layer.output_blocks);
    const int residual = static_cast<int>(layer.residual), output = static_cast<int>(layer.output);
    const int next = channels * kTilePoses, upper = 8 * kTilePoses;
    // Residuals of the next joints are in flight while the previous ones are used.
    constexpr int kAhead = 4;
    uint32_t before[2][kAhead][2];
    const auto load_residuals = [&](int joint, int at_index) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (joint + i >= kJoints) break;
            for (int half = 0; half < 2; ++half) {
                before[joint / kAhead % 2][i][half] =
                    load_shared_if(has_residual, memory, residual + 2 * (at_index + i * next + half * upper));
            }
        }
    };
    load_residuals(0, index);
#pragma unroll
    for (int joint = 0; joint < kJoints; ++joint) {
        if (joint % kAhead == 0 && joint + kAhead < kJoints) load_residuals(joint + kAhead, index + kAhead * next);
        const float* result = sums.values[0] + 4 * joint;
        const float* bias = biases.of[joint % Biases<kJoints, kProducts>::kCount];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int here = index + half * upper;
            const float2 residual_of = unpack_bfloat16(before[joint / kAhead % 2][joint % kAhead][half]);
            const auto finished = [&](float sum, float added) {
                if constexpr (kFinish == Finish::gelu) return finish<Activation::gelu>(sum, bias[half], added);
                return at_least(sum + bias[half], lowest) + added;
            };
            float2 value = {finished(result[2 * half], residual_of.x), finished(result[2 * half + 1], residual_of.y)};
            if (has_film) {
                value = {film(value.x, scale[half], shift[half]), film(value.y, scale[half], shift[half])};
            }
            store_shared_either(is_float, memory, output + 4 * here, output + 2 * here, value);
        }
        index += next;
    }
}

// Turns of a layer: one for each block of 64 channels.
__device__ inline int turns_of(const LayerRecord& layer) {
    return is_product(layer) ? (layer.output_blocks + kGroupBlocks - 1) / kGroupBlocks : 0;
}

// Copies the adjacency of a group's block from L2 before the group's turn, for which all of its threads wait. A thread
// can be ahead of others by one block at most, so two buffers in turn suffice.
constexpr int kStagedBytes = kWgmmaMaxJoints * kAdjacencyStride * static_cast<int>(sizeof(float));
static_assert(kWgmmaStagingBytes == 2 * 2 * kStagedBytes);

template <int kJoints>
__device__ inline const float* stage_adjacency(const LayerRecord& layer, unsigned char* staging, int which) {
    float* to = at<float>(staging, (2 * this_place().group + which) * kStagedBytes);
    for (int i = static_cast<int>(threadIdx.x) % kGroupThreads; i < kJoints * kAdjacencyStride / 4;
         i += kGroupThreads) {
        float four[4];
        load4(layer.adjacency + 4 * i, four), store4(to + 4 * i, four);
    }
    return to;
}

// A group's share of the blocks of a graph convolution or a linear layer. `turn` is the number of turns so far.
// `product_before` and `product_behind` tell whether the neighbouring layers are products, with no barrier in between.
template <int kJoints, int kProducts>
__device__ inline void product_layer(const LayerRecord& layer, unsigned char* memory, unsigned char* staging,
                                     Parameters parameters, unsigned turn, bool product_before, bool product_behind) {
    const int blocks = turns_of(layer);
#pragma unroll 1
    for (int block = static_cast<int>(turn + static_cast<unsigned>(this_place().group)) % 2; block < blocks;
         block += 2) {
        const Place place = this_place();
        const int channel_blocks = layer.input_blocks;
        hide_from_compiler(block);
        const float* adjacency = nullptr;
        if constexpr (kProducts == 2) {
            const unsigned number = turn + static_cast<unsigned>(block);
            adjacency = stage_adjacency<kJoints>(layer, staging, static_cast<int>(number / 2 % 2));
        }
        GroupSums<kJoints, kProducts> sums;
        const uint4* weight = static_cast<const uint4*>(layer.weight) +
                              block * rounds_of(channel_blocks) * kRound * kProducts * kGroupThreads +
                              place.warp * kWarpSize + place.row * 4 + place.quarter;
        add_group_products(sums, at<const Bfloat16>(memory, layer.input), weight, channel_blocks, place.group,
                           product_before && block == 0);
        const int channel_block = block * kGroupBlocks + place.warp;
        const bool is_used = channel_block < layer.output_blocks;
        Biases<kJoints, kProducts> biases;
        [[maybe_unused]] Factors<kJoints> factors(layer, channel_block, place);
        if (is_used && kProducts == 2) {
            biases.load(layer, channel_block, place);
            factors.load_early();
        }
        wait_for_products<0>();
        if (is_used) {
            if constexpr (kProducts == 2) mix_joints(adjacency, sums, factors);
            if constexpr (kProducts == 1) biases.load(layer, channel_block, place);
            // A linear layer has no activation.
            if (kProducts == 2 && layer.activation == Activation::gelu) {
                finish_block<kProducts == 2 ? Finish::gelu : Finish::plain>(layer, memory, parameters, sums, biases,
                                                                            channel_block, place);
            } else if (layer.film) {
                finish_block<Finish::film>(layer, memory, parameters, sums, biases, channel_block, place);
            } else {
                finish_block<Finish::plain>(layer, memory, parameters, sums, biases, channel_block, place);
            }
        }
        publish_to_products();
        if (product_behind && block + 1 == blocks) arrive_at_barrier(kLayerBarrier);
    }
}

}  // namespace diffupose
