// The product layers of one pose by a cluster of blocks, for few poses, where latency counts.
//
// Every block holds all activations of the pose in its shared memory. Of a product each block computes some blocks of
// 16 output channels and sends the results to all blocks of the cluster. After each product a block waits until it has
// received the whole output. Other layers need no exchange: every block computes all of them, with the same bits.
// Weights come from L2: a round's weights are loaded while the previous round is mixed and sent.
//
// A block that has received a whole product knows that all other blocks have read the product's inputs: they have sent
// their results, or a receipt if they compute none of the output channels. Blocks do not wait for each other anywhere
// else. So a product's output must not overlap anything read since the previous product. The memory plan ensures this
// (engines/cuda_plan.py).
//
// Products are transposed: rows are output channels, columns joints. The layouts are
//
//   activations          [joint group of 8 joints][channel block][lane][4]
//   weights              [block of 16 output channels][channel block][product][lane][8]
//   factors and biases   [block of 16 output channels][channel 16][kRow joints]
//   adjacency            [kRow][kRow]
//
// Of the 16 channels of a channel block, lane 4 g + t holds channels 2t, 2t + 1, 2t + 8 and 2t + 9 of joint g: the two
// registers of operand B. Of the weights it holds channels g and g + 8, rows 2t and 2t + 1, then 2t + 8 and 2t + 9: the
// four registers of operand A.
//
// Four warps share the input channels of a block of 16 output channels, always in the same way. So the bits of a pose
// depend on nothing but the pose.
#pragma once

#include "common/cuda_cluster.h"
#include "common/cuda_copy.h"
#include "engine/cuda/finish.cuh"
#include "engine/cuda/fragments.cuh"
#include "engine/cuda/loads.cuh"

namespace diffupose {

// Blocks of 16 output channels that a block of the cluster computes in a round, and warps that share the input channels
// of one. Three slots of eight blocks are 384 channels.
constexpr int kSlots = 3, kParts = 4;
constexpr int kClusterWarps = kSlots * kParts, kClusterThreads = kClusterWarps * kWarpSize;
constexpr int kSlotChannels = kSlots * kChannelBlock;
// Joints from one channel to the next. With 16 or 32, threads that read four joints of successive channels would meet
// the same banks of shared memory.
constexpr int kRow = kAdjacencyStride;
// Registers of weights that a lane loads ahead: six channel blocks of both products of a graph convolution.
constexpr int kHeld = 12;
// Channel blocks between two checks whether there are more.
constexpr int kHeldChunk = 3;

struct ClusterLayout {
    __device__ static int index(int joint, int channel, int channel_blocks) {
        const int in_channel_block = channel % kChannelBlock;
        return ((joint / 8 * channel_blocks + channel / kChannelBlock) * kWarpSize + joint % 8 * 4 +
                in_channel_block % 8 / 2) *
                   4 +
               in_channel_block / 8 * 2 + channel % 2;
    }
};

// What a round needs beside the weights.
struct RoundConstants {
    float own[kSlotChannels * kRow], neighbors[kSlotChannels * kRow], bias[kSlotChannels * kRow];
    float adjacency[kRow * kRow];
    float scale[kSlotChannels], shift[kSlotChannels];
};

// A block's shared memory after the activations. The records of the layers follow it.
struct ClusterMemory {
    float parts[kParts][2][kSlotChannels * kRow];  // sums of each part of the input channels
    RoundConstants constants[2];                   // of this round and of the next one
    unsigned char staged[kSlotChannels * kRow * 4];
    uint4 receipts[kClusterBlocks];  // from each block; only their arrival counts
    Mailbox mailboxes[2];            // for even products and for odd ones
};
static_assert(sizeof(ClusterMemory) % 8 == 0 && sizeof(LayerRecord) % 8 == 0);

// A thread's position in the cluster.
struct ClusterPlace {
    int rank, warp, slot, part;
    Lane lane;  // its `pose` is a row of eight here
};

__device__ inline ClusterPlace this_cluster_place() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return {cluster_rank(), warp, warp / kParts, warp % kParts, this_lane()};
}

// Rounds of a layer: in each of them a block of the cluster takes kSlots blocks of 16 channels.
__device__ inline int rounds_of(const LayerRecord& layer) {
    constexpr int kAtOnce = kSlots * kClusterBlocks;
    return (layer.output_blocks + kAtOnce - 1) / kAtOnce;
}
__device__ inline int block_of(int round, int slot, int rank) {
    return (round * kSlots + slot) * kClusterBlocks + rank;
}

// The next product layer after layer i; the first one after the last.
__device__ inline int next_product(const LayerRecord* layers, int num_layers, int i) {
    do {
        i = i + 1 == num_layers ? 0 : i + 1;
    } while (!is_product(layers[i]));
    return i;
}

// Channel blocks [first, first + count) of a layer's input, which one part of the warps takes.
struct Share {
    int first, count;
    __device__ Share(int channel_blocks, int part)
        : first(channel_blocks * part / kParts),
          count(channel_blocks * (part + 1) / kParts - channel_blocks * part / kParts) {}
};

// --- Loads from L2 ---------------------------------------------------------------------------------------------------

struct HeldWeights {
    uint4 of[kHeld];
};

template <int kProducts>
__device__ inline const uint4* weights_of(const LayerRecord& layer, int block, int channel_block, Lane lane) {
    return static_cast<const uint4*>(layer.weight) +
           (block * layer.input_blocks + channel_block) * kProducts * kWarpSize + lane.index;
}

// Starts to load the weights of a round.
__device__ inline void fetch_weights(const LayerRecord& layer, int round, HeldWeights& held,
                                     const ClusterPlace& place) {
    const bool two = layer.kind == LayerKind::graph_conv;
    const int block = block_of(round, place.slot, place.rank);
    const Share share(layer.input_blocks, place.part);
    const int count = block < layer.output_blocks ? (two ? 2 : 1) * share.count : 0;
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

// Starts to load the constants of a round. Each thread loads one piece, since a thread's chain of loads takes long.
__device__ inline void fetch_constants(const LayerRecord& layer, int round, const float* parameters,
                                       RoundConstants& constants, int rank) {
    constexpr int kPerBlock = kChannelBlock * kRow, kPieces = kPerBlock / 4, kScalePieces = kChannelBlock / 4;
    constexpr int kFactors = kSlots * kPieces, kAdjacency = kRow * kRow / 4, kScales = kSlots * kScalePieces;
    static_assert(kFactors + kAdjacency + 2 * kScales <= kClusterThreads);
    const bool two = layer.kind == LayerKind::graph_conv;
    int i = static_cast<int>(threadIdx.x);
    if (i < kFactors) {
        const int slot = i / kPieces, block = block_of(round, slot, rank);
        if (block >= layer.output_blocks) return;
        const int from = block * kPerBlock + 4 * (i - slot * kPieces);
        copy_async<16>(constants.bias + 4 * i, layer.bias + from);
        if (two) copy_async<16>(constants.own + 4 * i, layer.own + from);
        if (two) copy_async<16>(constants.neighbors + 4 * i, layer.neighbors + from);
    } else if ((i -= kFactors) < kAdjacency) {
        if (two) copy_async<16>(constants.adjacency + 4 * i, layer.adjacency + 4 * i);
    } else if ((i -= kAdjacency) < 2 * kScales && layer.film) {
        const bool is_shift = i >= kScales;
        const int piece = i % kScales, slot = piece / kScalePieces, block = block_of(round, slot, rank);
        if (block >= layer.output_blocks) return;
        const int from = (is_shift ? layer.output_blocks + block : block) * kChannelBlock + piece % kScalePieces * 4;
        copy_async<16>((is_shift ? constants.shift : constants.scale) + 4 * piece,
                       parameters + layer.parameters + from);
    }
}

// --- Products --------------------------------------------------------------------------------------------------------

// A part's sums of a block of 16 channels: [product][eight joints], channels g, g and g + 8, g + 8 of joints 2t, 2t
// + 1.
template <int kJointGroups, int kProducts>
using PartSums = float[kProducts][kJointGroups][4];

template <int kJointGroups, int kProducts>
__device__ inline void multiply_part(const LayerRecord& layer, unsigned char* memory, int block,
                                     const HeldWeights& held, const ClusterPlace& place,
                                     PartSums<kJointGroups, kProducts>& sums) {
    constexpr int kHeldBlocks = kHeld / kProducts;
    static_assert(kHeldBlocks % kHeldChunk == 0);
    const int channel_blocks = layer.input_blocks;
    const Share share(channel_blocks, place.part);
    const uint2* x = at<const uint2>(memory, layer.input) + share.first * kWarpSize + place.lane.index;
#pragma unroll
    for (int chunk = 0; chunk < kHeldBlocks / kHeldChunk; ++chunk) {
        if (chunk * kHeldChunk >= share.count) break;
#pragma unroll
        for (int i = chunk * kHeldChunk; i < (chunk + 1) * kHeldChunk; ++i) {
            // Weights of zero must be multiplied by finite activations, so by those of the last channel block.
            const int here = i < share.count ? i : share.count - 1;
#pragma unroll
            for (int joint_group = 0; joint_group < kJointGroups; ++joint_group) {
                const uint2 b = x[(joint_group * channel_blocks + here) * kWarpSize];
#pragma unroll
                for (int product = 0; product < kProducts; ++product) {
                    multiply(sums[product][joint_group], held.of[i * kProducts + product], b.x, b.y);
                }
            }
        }
    }
    const uint4* weights = weights_of<kProducts>(layer, block, share.first, place.lane);
    const int count = block < layer.output_blocks ? share.count : 0;
    for (int i = kHeldBlocks; i < count; ++i) {
        uint4 a[kProducts];
#pragma unroll
        for (int product = 0; product < kProducts; ++product) {
            a[product] = __ldg(weights + (i * kProducts + product) * kWarpSize);
        }
#pragma unroll
        for (int joint_group = 0; joint_group < kJointGroups; ++joint_group) {
            const uint2 b = x[(joint_group * channel_blocks + i) * kWarpSize];
#pragma unroll
            for (int product = 0; product < kProducts; ++product)
                multiply(sums[product][joint_group], a[product], b.x, b.y);
        }
    }
}

template <int kJointGroups, int kProducts>
__device__ inline void store_part(ClusterMemory& shared, const PartSums<kJointGroups, kProducts>& sums,
                                  const ClusterPlace& place) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int joint_group = 0; joint_group < kJointGroups; ++joint_group) {
            const int joint = 8 * joint_group + 2 * place.lane.quarter;
            if (joint >= kRow) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = place.slot * kChannelBlock + place.lane.pose + 8 * half;
                const float* two = sums[product][joint_group] + 2 * half;
                *reinterpret_cast<float2*>(shared.parts[place.part][product] + channel * kRow + joint) =
                    make_float2(two[0], two[1]);
            }
        }
    }
}

// Sum over the parts, in a fixed order.
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

// Applies bias, activation, residual and FiLM to four joints of a channel, in place. `in_slots` is the channel within
// the round, `channel` within the layer.
__device__ inline void finish_four(const LayerRecord& layer, unsigned char* memory, const RoundConstants& constants,
                                   int in_slots, int channel, int joint, float* values) {
    const Activation activation = layer.activation;
    const bool has_residual = layer.residual >= 0, has_film = layer.film;
    float bias[4], residual[4] = {};
    load4(constants.bias + in_slots * kRow + joint, bias);
    if (has_residual) {  // all loads first; padded joints have some number there, too
        const auto* from =
            at<const Bfloat16>(memory, layer.residual) + ClusterLayout::index(joint, channel, layer.output_blocks);
#pragma unroll
        for (int i = 0; i < 4; ++i) residual[i] = to_float(from[i * kChannelBlock]);
    }
    with_activation(activation, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = finish<decltype(kind)::value>(values[i], bias[i], residual[i]);
    });
    if (has_film) {
        const float scale = constants.scale[in_slots], shift = constants.shift[in_slots];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = film(values[i], scale, shift);
    }
}

// Bytes that a block receives for a layer from all blocks, including itself.
__device__ inline int bytes_of_mail(const LayerRecord& layer, int joints) {
    const int without = layer.output_blocks < kClusterBlocks ? kClusterBlocks - layer.output_blocks : 0;
    return joints * layer.output_blocks * kChannelBlock * (layer.output_is_float ? 4 : 2) +
           without * static_cast<int>(sizeof(uint4));
}

// Sends what this block has staged of a round to all blocks of the cluster.
template <typename T>
__device__ inline void tell_cluster(const LayerRecord& layer, unsigned char* memory, const unsigned char* staged,
                                    Mailbox& mailbox, int round, int joints, int rank) {
    constexpr int kPieces = static_cast<int>(sizeof(T));  // of 16 bytes: 16 channels of a joint
    constexpr int kGroup = 128, kGroups = kClusterThreads / kGroup;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread % kGroup; i < kSlots * kRow * kPieces; i += kGroup) {
        const int block = block_of(round, i / (kRow * kPieces), rank), joint = i / kPieces % kRow;
        if (block >= layer.output_blocks || joint >= joints) continue;
        const uint4 words = *reinterpret_cast<const uint4*>(staged + 16 * i);
        const int index = ClusterLayout::index(joint, block * kChannelBlock, layer.output_blocks);
        unsigned char* to = memory + layer.output + index * kPieces + i % kPieces * 16;
        // Threads begin with different blocks, so that no block receives everything at once.
        for (int k = thread / kGroup; k < kClusterBlocks; k += kGroups) {
            send((rank + k) % kClusterBlocks, to, words, mailbox);
        }
    }
}

// Adds the parts, finishes the layer and sends the results to all blocks. The caller has synchronised the block.
template <int kJointGroups, int kProducts>
__device__ inline void end_round(const LayerRecord& layer, unsigned char* memory, ClusterMemory& shared,
                                 const RoundConstants& constants, Mailbox& mailbox, int round, int joints, int rank) {
    constexpr int kFours = kJointGroups == 2 ? 4 : kRow / 4;
    static_assert(kFours * kSlotChannels <= kClusterThreads);
    const int thread = static_cast<int>(threadIdx.x), in_slots = thread % kSlotChannels;
    const int joint = 4 * (thread / kSlotChannels), index = in_slots * kRow + joint;
    const int block = block_of(round, in_slots / kChannelBlock, rank);
    const bool there = thread < kFours * kSlotChannels && block < layer.output_blocks;
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
        const int in_block = in_slots % kChannelBlock, channel = block * kChannelBlock + in_block;
        finish_four(layer, memory, constants, in_slots, channel, joint, values);
        const int staged =
            (in_slots / kChannelBlock * kRow + joint) * kChannelBlock + ClusterLayout::index(0, in_block, 1);
        const auto stage = [&](auto* to) {
            using T = std::remove_pointer_t<decltype(to)>;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[staged + i * kChannelBlock] = from_float<T>(values[i]);
        };
        if (layer.output_is_float) {
            stage(at<float>(shared.staged, 0));
        } else {
            stage(at<Bfloat16>(shared.staged, 0));
        }
    }
    __syncthreads();
    if (layer.output_is_float) {
        tell_cluster<float>(layer, memory, shared.staged, mailbox, round, joints, rank);
    } else {
        tell_cluster<Bfloat16>(layer, memory, shared.staged, mailbox, round, joints, rank);
    }
    if (rank >= layer.output_blocks && thread < kClusterBlocks) {  // such a layer is one round
        send(thread, shared.receipts + rank, make_uint4(0, 0, 0, 0), mailbox);
    }
}

}  // namespace diffupose
