// The layers of one pose by a cluster of blocks, for few poses, where latency is all that counts.
//
// Every block holds all activations of the pose in its shared memory. Of a product it takes some blocks of 16 output
// channels, and sends what comes out to all blocks of the cluster; behind each product a block waits until it has
// everything, for nothing else. The other layers every block computes by itself, all of them the same bits. Weights
// come from L2: what a round takes is asked for while the round before is mixed and on its way.
//
// Who has everything of a product knows that all others have read what they need for it, since they have sent it, or if
// they take no part in it a receipt. So where a product's output goes, nothing may lie that is read for that product,
// or for what lies between it and the one before; who plans the memory sees to that (engines/cuda_plan.py).
//
// Products are transposed: rows are output channels, columns joints. Activations [eight joints][step][lane][4]: of 16
// channels (a step), lane 4 g + t holds channels 2t, 2t + 1, 2t + 8 and 2t + 9 of joint g, the two registers of operand
// B. Weights [block of 16 channels][step][product][lane][8], the four registers of operand A: of channels g and g + 8,
// rows 2t and 2t + 1, then 2t + 8 and 2t + 9. Factors and biases [block][channel 16][kRow joints]; the adjacency
// [kRow][kRow].
//
// Four warps share the input channels of a block of 16 output channels, in the same way whatever runs: the bits of a
// pose depend on nothing but the pose.
#pragma once

#include "common/cuda_cluster.h"
#include "common/cuda_copy.h"
#include "engine/cuda/loads.cuh"
#include "engine/cuda/pair_tasks.cuh"

namespace diffupose {

// Blocks of 16 channels that a block of the cluster takes at once (three are what width 384 has for each of eight), and
// warps that share the input channels of one.
constexpr int kSlots = 3, kParts = 4;
constexpr int kClusterWarps = kSlots * kParts, kClusterThreads = kClusterWarps * kWarpSize;
constexpr int kSlotChannels = kSlots * kStepChannels;
// Joints from one channel to the next. Not 16 or 32: threads that read four joints of successive channels shall meet
// different banks.
constexpr int kRow = kAdjacencyStride;
// Registers of weights that a lane holds ahead: six steps of both products of a graph convolution.
constexpr int kHeld = 12;
// Steps between two looks at whether there are more.
constexpr int kHeldChunk = 3;

struct ClusterLayout {
    __device__ static int index(int joint, int channel, int steps) {
        const int in_step = channel % kStepChannels;
        return ((joint / 8 * steps + channel / kStepChannels) * kWarpSize + joint % 8 * 4 + in_step % 8 / 2) * 4 +
               in_step / 8 * 2 + channel % 2;
    }
};

// What a round needs of its blocks beside the weights.
struct RoundConstants {
    float own[kSlotChannels * kRow], neighbors[kSlotChannels * kRow], bias[kSlotChannels * kRow];
    float adjacency[kRow * kRow];
    float scale[kSlotChannels], shift[kSlotChannels];
};

// A block's shared memory behind the activations; the layers' records lie behind it.
struct ClusterMemory {
    float parts[kParts][2][kSlotChannels * kRow];  // sums of each part of the input channels
    RoundConstants constants[2];                   // of this round and of the next one
    unsigned char staged[kSlotChannels * kRow * 4];
    uint4 receipts[kClusterBlocks];  // of each block; what they say is never read
    Mailbox mailboxes[2];            // of even products and of odd ones
};
static_assert(sizeof(ClusterMemory) % 8 == 0 && sizeof(LayerRecord) % 8 == 0);

// What a thread knows of where it is.
struct ClusterPlace {
    int rank, warp, slot, part;
    Lane lane;  // its `pose` is a row of eight here
};

__device__ inline ClusterPlace this_cluster_place() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return {cluster_rank(), warp, warp / kParts, warp % kParts, this_lane()};
}

__device__ inline bool is_product(const LayerRecord& layer) {
    return layer.kind == LayerKind::graph_conv || layer.kind == LayerKind::linear;
}

// A round of a layer: each block of the cluster takes kSlots blocks of 16 channels.
struct Round {
    int layer, number;
};
__device__ inline int rounds_of(const LayerRecord& layer) {
    constexpr int kAtOnce = kSlots * kClusterBlocks;
    return (layer.output_steps + kAtOnce - 1) / kAtOnce;
}
__device__ inline int block_of(int round, int slot, int rank) {
    return (round * kSlots + slot) * kClusterBlocks + rank;
}

// The next product layer behind one, the first one behind the last.
__device__ inline int next_product(const LayerRecord* layers, int num_layers, int i) {
    do {
        i = i + 1 == num_layers ? 0 : i + 1;
    } while (!is_product(layers[i]));
    return i;
}

// Channels [first, first + count) of a layer's input, in steps of 16, that a part of the warps takes.
struct Share {
    int first, count;
    __device__ Share(int steps, int part)
        : first(steps * part / kParts), count(steps * (part + 1) / kParts - steps * part / kParts) {}
};

// --- What a round reads from L2 --------------------------------------------------------------------------------------

struct HeldWeights {
    uint4 of[kHeld];
};

template <int kProducts>
__device__ inline const uint4* weights_of(const LayerRecord& layer, int block, int step, Lane lane) {
    return static_cast<const uint4*>(layer.weight) + (block * layer.input_steps + step) * kProducts * kWarpSize +
           lane.index;
}

// Asks for the weights of a round.
__device__ inline void fetch_weights(const LayerRecord& layer, int round, HeldWeights& held,
                                     const ClusterPlace& place) {
    const bool two = layer.kind == LayerKind::graph_conv;
    const int block = block_of(round, place.slot, place.rank);
    const Share share(layer.input_steps, place.part);
    const int count = block < layer.output_steps ? (two ? 2 : 1) * share.count : 0;
    const uint4* from = two ? weights_of<2>(layer, block, share.first, place.lane)
                            : weights_of<1>(layer, block, share.first, place.lane);
    if (count >= kHeld) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held.of[i] = __ldcg(from + i * kWarpSize);
    } else {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held.of[i] = load_if(from + i * kWarpSize, i < count);
    }
}

// Asks for the rest: each thread for one thing, since whoever waits for the chain of one address after the other waits
// long.
__device__ inline void fetch_constants(const LayerRecord& layer, int round, const float* parameters,
                                       RoundConstants& constants, int rank) {
    constexpr int kPerBlock = kStepChannels * kRow, kPieces = kPerBlock / 4, kScalePieces = kStepChannels / 4;
    constexpr int kFactors = kSlots * kPieces, kAdjacency = kRow * kRow / 4, kScales = kSlots * kScalePieces;
    static_assert(kFactors + kAdjacency + 2 * kScales <= kClusterThreads);
    const bool two = layer.kind == LayerKind::graph_conv;
    int i = static_cast<int>(threadIdx.x);
    if (i < kFactors) {
        const int slot = i / kPieces, block = block_of(round, slot, rank);
        if (block >= layer.output_steps) return;
        const int from = block * kPerBlock + 4 * (i - slot * kPieces);
        copy_async<16>(constants.bias + 4 * i, layer.bias + from);
        if (two) copy_async<16>(constants.own + 4 * i, layer.own + from);
        if (two) copy_async<16>(constants.neighbors + 4 * i, layer.neighbors + from);
    } else if ((i -= kFactors) < kAdjacency) {
        if (two) copy_async<16>(constants.adjacency + 4 * i, layer.adjacency + 4 * i);
    } else if ((i -= kAdjacency) < 2 * kScales && layer.film) {
        const bool is_shift = i >= kScales;
        const int piece = i % kScales, slot = piece / kScalePieces, block = block_of(round, slot, rank);
        if (block >= layer.output_steps) return;
        const int from = (is_shift ? layer.output_steps + block : block) * kStepChannels + piece % kScalePieces * 4;
        copy_async<16>((is_shift ? constants.shift : constants.scale) + 4 * piece,
                       parameters + layer.parameters + from);
    }
}

// --- Products --------------------------------------------------------------------------------------------------------

// A part's sums of a block of 16 channels: [product][eight joints], channels g, g and g + 8, g + 8 of joints 2t, 2t
// + 1.
template <int kTiles, int kProducts>
using PartSums = float[kProducts][kTiles][4];

template <int kTiles, int kProducts>
__device__ inline void multiply_part(const LayerRecord& layer, unsigned char* memory, int block,
                                     const HeldWeights& held, const ClusterPlace& place,
                                     PartSums<kTiles, kProducts>& sums) {
    constexpr int kHeldSteps = kHeld / kProducts;
    static_assert(kHeldSteps % kHeldChunk == 0);
    const int steps = layer.input_steps;
    const Share share(steps, place.part);
    const uint2* x = at<const uint2>(memory, layer.input) + share.first * kWarpSize + place.lane.index;
#pragma unroll
    for (int chunk = 0; chunk < kHeldSteps / kHeldChunk; ++chunk) {
        if (chunk * kHeldChunk >= share.count) break;
#pragma unroll
        for (int i = chunk * kHeldChunk; i < (chunk + 1) * kHeldChunk; ++i) {
            // What weights of zero are multiplied with must be numbers that there are.
            const int here = i < share.count ? i : share.count - 1;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint2 b = x[(tile * steps + here) * kWarpSize];
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    multiply(sums[product][tile], held.of[i * kProducts + product], b.x, b.y);
                }
            }
        }
    }
    const uint4* weights = weights_of<kProducts>(layer, block, share.first, place.lane);
    const int count = block < layer.output_steps ? share.count : 0;
    for (int i = kHeldSteps; i < count; ++i) {
        uint4 a[kProducts];
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            a[product] = __ldg(weights + (i * kProducts + product) * kWarpSize);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint2 b = x[(tile * steps + i) * kWarpSize];
#pragma unroll
            for (int product = 0; product < kProducts; ++product) multiply(sums[product][tile], a[product], b.x, b.y);
        }
    }
}

template <int kTiles, int kProducts>
__device__ inline void store_part(ClusterMemory& shared, const PartSums<kTiles, kProducts>& sums,
                                  const ClusterPlace& place) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const int joint = 8 * tile + 2 * place.lane.quarter;
            if (joint >= kRow) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = place.slot * kStepChannels + place.lane.pose + 8 * half;
                const float* two = sums[product][tile] + 2 * half;
                *reinterpret_cast<float2*>(shared.parts[place.part][product] + channel * kRow + joint) =
                    make_float2(two[0], two[1]);
            }
        }
    }
}

// The sum of all parts, in a fixed order.
__device__ inline void add_parts(const ClusterMemory& shared, int product, int index, float* sum) {
    load4(shared.parts[0][product] + index, sum);
#pragma unroll
    for (int part = 1; part < kParts; ++part) {
        float more[4];
        load4(shared.parts[part][product] + index, more);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += more[i];
    }
}

// Bias, activation, residual and FiLM of four joints of a channel, in place; `in_slots` is the channel among those of
// the round, `channel` among those of the layer.
__device__ inline void finish_four(const LayerRecord& layer, unsigned char* memory, const RoundConstants& constants,
                                   int in_slots, int channel, int joint, float* values) {
    const CudaActivation activation = layer.activation;
    const bool has_residual = layer.residual >= 0, film = layer.film;
    float bias[4], residual[4] = {};
    load4(constants.bias + in_slots * kRow + joint, bias);
    if (has_residual) {  // before all else, at the same time; padded joints have some number there, too
        const auto* from =
            at<const Bfloat16>(memory, layer.residual) + ClusterLayout::index(joint, channel, layer.output_steps);
#pragma unroll
        for (int i = 0; i < 4; ++i) residual[i] = to_float(from[i * kStepChannels]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] += bias[i];
    if (activation == CudaActivation::relu) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = activate<CudaActivation::relu>(values[i]);
    } else if (activation == CudaActivation::gelu) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = activate<CudaActivation::gelu>(values[i]);
    }
    if (has_residual) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] += residual[i];
    }
    if (film) {
        const float scale = constants.scale[in_slots], shift = constants.shift[in_slots];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = silu(values[i] * scale + shift);
    }
}

// What a block gets for a layer from all blocks, itself among them.
__device__ inline int bytes_of_mail(const LayerRecord& layer, int joints) {
    const int without = layer.output_steps < kClusterBlocks ? kClusterBlocks - layer.output_steps : 0;
    return joints * layer.output_steps * kStepChannels * (layer.output_is_float ? 4 : 2) +
           without * static_cast<int>(sizeof(uint4));
}

// What this block has staged of a round, to all blocks of the cluster.
template <typename T>
__device__ inline void tell_cluster(const LayerRecord& layer, unsigned char* memory, const unsigned char* staged,
                                    Mailbox& mailbox, int round, int joints, int rank) {
    constexpr int kPieces = static_cast<int>(sizeof(T));  // of 16 bytes: 16 channels of a joint
    constexpr int kGroup = 128, kGroups = kClusterThreads / kGroup;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread % kGroup; i < kSlots * kRow * kPieces; i += kGroup) {
        const int block = block_of(round, i / (kRow * kPieces), rank), joint = i / kPieces % kRow;
        if (block >= layer.output_steps || joint >= joints) continue;
        const uint4 words = *reinterpret_cast<const uint4*>(staged + 16 * i);
        const int index = ClusterLayout::index(joint, block * kStepChannels, layer.output_steps);
        unsigned char* to = memory + layer.output + index * kPieces + i % kPieces * 16;
        // Not all of them to the same block at the same time.
        for (int k = thread / kGroup; k < kClusterBlocks; k += kGroups) {
            send((rank + k) % kClusterBlocks, to, words, mailbox);
        }
    }
}

// The sums of all parts to what the layer gives, and that to all blocks: behind a barrier of the block.
template <int kTiles, int kProducts>
__device__ inline void end_round(const LayerRecord& layer, unsigned char* memory, ClusterMemory& shared,
                                 const RoundConstants& constants, Mailbox& mailbox, int round, int joints, int rank) {
    constexpr int kFours = kTiles == 2 ? 4 : kRow / 4;
    static_assert(kFours * kSlotChannels <= kClusterThreads);
    const int thread = static_cast<int>(threadIdx.x), in_slots = thread % kSlotChannels;
    const int joint = 4 * (thread / kSlotChannels), index = in_slots * kRow + joint;
    const int block = block_of(round, in_slots / kStepChannels, rank);
    const bool there = thread < kFours * kSlotChannels && block < layer.output_steps;
    float values[4];
    if (there) {
        add_parts(shared, 0, index, values);
        if constexpr (kProducts == 2) {
            float others[4], own[4], neighbors[4];
            add_parts(shared, 1, index, others);
            load4(constants.own + index, own), load4(constants.neighbors + index, neighbors);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                values[i] *= own[i];
                others[i] = joint + i < joints ? others[i] * neighbors[i] : 0.0f;  // padded joints may be NaN
            }
            store4(shared.parts[0][1] + index, others);
        }
    }
    if constexpr (kProducts == 2) __syncthreads();
    if (there) {
        if constexpr (kProducts == 2) {
#pragma unroll
            for (int four = 0; four < kFours; ++four) {
                float others[4];
                load4(shared.parts[0][1] + in_slots * kRow + 4 * four, others);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float row[4];
                    load4(constants.adjacency + (joint + i) * kRow + 4 * four, row);
#pragma unroll
                    for (int j = 0; j < 4; ++j) values[i] = fmaf(row[j], others[j], values[i]);
                }
            }
        }
        const int in_block = in_slots % kStepChannels, channel = block * kStepChannels + in_block;
        finish_four(layer, memory, constants, in_slots, channel, joint, values);
        const int staged =
            (in_slots / kStepChannels * kRow + joint) * kStepChannels + ClusterLayout::index(0, in_block, 1);
        if (layer.output_is_float) {
#pragma unroll
            for (int i = 0; i < 4; ++i) store1(at<float>(shared.staged, 0) + staged + i * kStepChannels, values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) store1(at<Bfloat16>(shared.staged, 0) + staged + i * kStepChannels, values[i]);
        }
    }
    __syncthreads();
    if (layer.output_is_float) {
        tell_cluster<float>(layer, memory, shared.staged, mailbox, round, joints, rank);
    } else {
        tell_cluster<Bfloat16>(layer, memory, shared.staged, mailbox, round, joints, rank);
    }
    if (rank >= layer.output_steps && thread < kClusterBlocks) {  // which is one round
        send(thread, shared.receipts + rank, make_uint4(0, 0, 0, 0), mailbox);
    }
}

}  // namespace diffupose
