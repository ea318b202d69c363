// The layers of one tile of eight poses by two warpgroups of Hopper, with its activations in shared memory.
//
// Products are transposed: rows are output channels, columns joints times poses. So 17 joints are 136 columns, which is
// a width that the instruction has, weights are operand A, which comes from L2 to the registers that use it, and of its
// channels and poses a thread has all joints: the product with the adjacency takes no exchange.
//
// Activations [joint][channel][pose 8]: eight channels of a joint are a core matrix of operand B. Weights
// [block of 64 channels][step][product][warp][lane][8], the registers of operand A (wgmma.cuh); products are 2 for a
// graph convolution, 1 for a linear layer; steps are padded by zeros to whole rounds, and kWgmmaStepsAhead more of them
// lie behind the last block. Factors (`own`, `neighbors`) [step][half][four joints][channel 8][4].
// The adjacency is transposed: a row is what a neighbour weighs in all joints.
//
// The warpgroups take turns: while one multiplies a block of 64 channels, the other mixes the joints of the block
// before and stores them. Turns are counted through all layers of all steps, and the first block of a layer is
// multiplied while the last one of the layer before is being stored, up to where it needs it.
#pragma once

#include "engine/cuda/pair_tasks.cuh"
#include "engine/cuda/persistent/wgmma.cuh"

namespace diffupose {

constexpr int kWgmmaWarps = kBlockThreads / kWarpSize;
constexpr int kGroupSteps = kGroupRows / kStepChannels;  // steps of the next layer that a block of this one makes
// Steps of weights that a thread holds: one is multiplied, the others are on their way from L2. As many as a block
// makes, so that what the layer before makes last is asked for in the last round.
constexpr int kRing = kGroupSteps, kRound = kWgmmaRoundSteps;
static_assert(kRing == kWgmmaStepsAhead + 1 && kRound % kRing == 0);
// Numbers of barriers: of a warpgroup's turn, the first one's and the second's, and of a layer's last block.
constexpr int kTurnBarrier = 1, kLayerBarrier = 3;

struct WgmmaLayout {
    __device__ static int index(int joint, int pose, int channel, int steps) {
        return (joint * steps * kStepChannels + channel) * kTilePoses + pose;
    }
};

// Where a thread's numbers lie in a product and in the other layers: channel `row` of eight, poses 2 `quarter` and the
// next; eight channels of all poses are 128 bytes behind each other.
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

// The parameters of a step of the reverse process: where they are is told when it is asked, to hold no register.
struct Parameters {
    const CudaSampleArgs& args;
    int step;
    __device__ const float* get() const { return args.parameters + step * args.num_parameters; }
};

// Numbers of poses 2 `quarter` and the next.
__device__ inline float2 unpack_bfloat16(uint32_t word) {
    return make_float2(to_float(word << 16), to_float(word & 0xffff0000u));
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

// What a thread holds of a step's weights.
template <int kProducts>
struct StepWeights {
    uint4 of[kProducts];

    // Weights pass by: what is read again and again shall stay in L1.
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

// Of a block: channel row, then channel row + 8, of two poses of every joint.
template <int kJoints, int kProducts>
struct GroupSums {
    float values[kProducts][4 * kJoints];
};

// Rounds of the ring that a layer takes: steps behind the last one have weights of zero.
__device__ inline int rounds_of(int steps) { return (steps + kRound - 1) / kRound; }

// Asks for the products of all steps: they are done when they have been waited for. `weight` is this thread's of the
// block; in the last round the group waits for the end of the layer before if it must.
//
// Without a branch from one step to the next: with branches the compiler waits for all loads that are under way where
// it needs the oldest.
template <int kJoints, int kProducts>
__device__ inline void add_group_products(GroupSums<kJoints, kProducts>& sums, const void* x, const uint4* weight,
                                          int steps, int group, bool layer_before) {
    StepWeights<kProducts> ring[kRing];
    const int rounds = rounds_of(steps);
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) ring[i].load(weight + i * kProducts * kGroupThreads);
    const uint4* next = weight + (kRing - 1) * kProducts * kGroupThreads;
    // A first product that adds to nothing would do as well, but the compiler would think that it reads what the block
    // before has left, and keep the registers for that.
#pragma unroll
    for (int i = 0; i < kProducts * 4 * kJoints; ++i) (&sums.values[0][0])[i] = 0.0f;
    const uint64_t b = describe(x, steps * kStepChannels * kTilePoses * 2);
    sync_barrier(kTurnBarrier + group);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        if (layer_before && round + 1 == rounds) sync_barrier(kLayerBarrier);
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
            // What weights of zero are multiplied with must be there, and no more than that.
            const int here = round * kRound + i, step = here < steps ? here : steps - 1;
            begin_products();
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
                multiply_group<kJoints>(sums.values[product], ring[i % kRing].of[product],
                                        advance(b, step * kStepChannels * kTilePoses * 2));
            }
            commit_products();
            // Those of the step before are done, and its weights make room. Behind the last ones are those of the next
            // block, which are read and not used.
            wait_for_products<1>();
            ring[(i + kRing - 1) % kRing].load(next);
            next += kProducts * kGroupThreads;
        }
    }
    arrive_at_barrier(kTurnBarrier + 1 - group);
}

// Reads a row of the adjacency.
template <int kJoints>
__device__ inline void load_row(const float* adjacency, int joint, float* row) {
#pragma unroll
    for (int i = 0; i < kJoints; i += 4) load4(adjacency + joint * kAdjacencyStride + i, row + i);
}

// What is loaded behind it is not loaded before it: the compiler would load everything at once and have no registers.
__device__ inline void keep_order() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("bar.warp.sync 0xffffffff;\n" ::: "memory");
#endif
}

// A number that the compiler cannot follow: it would hold what it computes from a counter in registers of their own.
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

// What a block's end reads from L2: the first of it is asked for while the last products are under way, the rest ahead
// of its use.
template <int kJoints>
struct Factors {
    static constexpr int kFours = (kJoints + 3) / 4, kFour = 8 * 4;  // factors of four joints, eight channels
    static constexpr int kEarly = kJoints == 17 ? 3 : 4;             // before the products are done: more would spill
    FourFactors own[kFours], neighbors[2];                           // of these as many as are at work or on their way
    const LayerRecord& layer;
    int begin;

    // `step` is that of the warp's channels.
    __device__ Factors(const LayerRecord& layer, int step, Place place)
        : layer(layer), begin(step * 2 * kFours * kFour + place.row * 4) {}
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

// own * H0 + A (neighbors * H1), in place of H0: neighbour by neighbour, whose numbers are done with then. `adjacency`
// lies in shared memory.
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
    float weights[2][4 * kFours];  // of a row what a neighbour weighs in all joints
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

// What is a piece of code of its own, without a branch from the first joint to the last but that of FiLM behind GELU.
enum class Finish { plain, film, gelu };

// Bias of channel row and channel row + 8 of a warp's 16 channels, of every joint where a linear layer has it so.
template <int kJoints, int kProducts>
struct Biases {
    static constexpr int kCount = kProducts == 1 ? kJoints : 1;
    float of[kCount][2];

    __device__ void load(const LayerRecord& layer, int step, Place place) {
        const float* from = layer.bias + step * kStepChannels + place.row;
        const int next = kProducts == 1 && layer.bias_per_joint ? layer.output_steps * kStepChannels : 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) of[i][0] = from[i * next], of[i][1] = from[i * next + 8];
    }
};

// Bias, activation, residual and FiLM of a warp's 16 channels, and where the result goes. What the record says is read
// before the loop: the compiler cannot know that stores leave it as it is.
template <Finish kFinish, int kJoints, int kProducts>
__device__ inline void finish_block(const LayerRecord& layer, unsigned char* memory, Parameters parameters,
                                    GroupSums<kJoints, kProducts>& sums, const Biases<kJoints, kProducts>& biases,
                                    int step, Place place) {
    const int channels = layer.output_steps * kStepChannels, first = step * kStepChannels + place.row;
    const bool film = kFinish == Finish::film || (kFinish == Finish::gelu && layer.film);
    const bool is_float = layer.output_is_float, has_residual = layer.residual >= 0;
    const float lowest = layer.activation == CudaActivation::relu ? 0.0f : -INFINITY;
    float scale[2] = {}, shift[2] = {};
    if (film) {
        const float* at_channel = parameters.get() + layer.parameters + first;
        scale[0] = at_channel[0], scale[1] = at_channel[8];
        shift[0] = at_channel[channels], shift[1] = at_channel[channels + 8];
    }
    int index = WgmmaLayout::index(0, 2 * place.quarter, first, layer.output_steps);
    const int residual = static_cast<int>(layer.residual), output = static_cast<int>(layer.output);
    const int next = channels * kTilePoses, upper = 8 * kTilePoses;
    // Residuals of some joints are on their way while those before are used.
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
            float2 value = {result[2 * half] + bias[half], result[2 * half + 1] + bias[half]};
            if constexpr (kFinish == Finish::gelu) {
                value = {activate<CudaActivation::gelu>(value.x), activate<CudaActivation::gelu>(value.y)};
            } else {
                value = {value.x < lowest ? lowest : value.x, value.y < lowest ? lowest : value.y};  // NaN stays NaN
            }
            const float2 added = unpack_bfloat16(before[joint / kAhead % 2][joint % kAhead][half]);
            value.x += added.x, value.y += added.y;
            if (film) value = {silu(value.x * scale[half] + shift[half]), silu(value.y * scale[half] + shift[half])};
            store_shared_either(is_float, memory, output + 4 * here, output + 2 * here, value);
        }
        index += next;
    }
}

__device__ inline bool is_product(const LayerRecord& layer) {
    return layer.kind == LayerKind::graph_conv || layer.kind == LayerKind::linear;
}

// Blocks of 64 channels, one turn each.
__device__ inline int turns_of(const LayerRecord& layer) {
    return is_product(layer) ? (layer.output_steps + kGroupSteps - 1) / kGroupSteps : 0;
}

// The adjacency of a group's block: it comes from L2 before the group's turn, which all of its threads await. A thread
// that is done with a block is ahead of others by one at most: there are two places, used in turn.
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

// A graph convolution or a linear layer, by a group's share of its blocks. `turn` is how many there were before;
// `product_before` and `product_behind` say whether such layers are its neighbours, with no barrier between them.
template <int kJoints, int kProducts>
__device__ inline void product_layer(const LayerRecord& layer, unsigned char* memory, unsigned char* staging,
                                     Parameters parameters, unsigned turn, bool product_before, bool product_behind) {
    const int blocks = turns_of(layer);
#pragma unroll 1
    for (int block = static_cast<int>(turn + static_cast<unsigned>(this_place().group)) % 2; block < blocks;
         block += 2) {
        const Place place = this_place();
        const int steps = layer.input_steps;
        hide_from_compiler(block);
        const float* adjacency = nullptr;
        if constexpr (kProducts == 2) {
            const unsigned number = turn + static_cast<unsigned>(block);
            adjacency = stage_adjacency<kJoints>(layer, staging, static_cast<int>(number / 2 % 2));
        }
        GroupSums<kJoints, kProducts> sums;
        const uint4* weight = static_cast<const uint4*>(layer.weight) +
                              block * rounds_of(steps) * kRound * kProducts * kGroupThreads + place.warp * kWarpSize +
                              place.row * 4 + place.quarter;
        add_group_products(sums, at<const Bfloat16>(memory, layer.input), weight, steps, place.group,
                           product_before && block == 0);
        const int step = block * kGroupSteps + place.warp;
        const bool is_used = step < layer.output_steps;
        Biases<kJoints, kProducts> biases;
        [[maybe_unused]] Factors<kJoints> factors(layer, step, place);
        if (is_used && kProducts == 2) {
            biases.load(layer, step, place);
            factors.load_early();
        }
        wait_for_products<0>();
        if (is_used) {
            if constexpr (kProducts == 2) mix_joints(adjacency, sums, factors);
            if constexpr (kProducts == 1) biases.load(layer, step, place);
            // A linear layer has no activation.
            if (kProducts == 2 && layer.activation == CudaActivation::gelu) {
                finish_block<kProducts == 2 ? Finish::gelu : Finish::plain>(layer, memory, parameters, sums, biases,
                                                                            step, place);
            } else if (layer.film) {
                finish_block<Finish::film>(layer, memory, parameters, sums, biases, step, place);
            } else {
                finish_block<Finish::plain>(layer, memory, parameters, sums, biases, step, place);
            }
        }
        publish_to_products();
        if (product_behind && block + 1 == blocks) arrive_at_barrier(kLayerBarrier);
    }
}

}  // namespace diffupose
