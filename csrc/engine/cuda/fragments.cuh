// The layout `pairs`: a thread loads the operands of mma.m16n8k16 from memory as they lie there.
//
// The rows of a matrix instruction are two joints of eight poses: rows 0 to 7 are joint 2p, rows 8 to 15 joint 2p + 1.
// In the result a thread holds pose `lane / 4` and channels 2 (lane % 4) and the next, of both joints. So one thread
// has all joints of a pose and a channel, and the product with the adjacency needs no exchange between threads.
//
// Activations [pair][channel block][lane][8]: of the 16 channels of a block, lane 4 g + t holds eight numbers of pose
// g. Their order is (joint 0, joint 1) of channels 2t, 2t + 1, then of channels 2t + 8, 2t + 9. These are the four
// registers of operand A.
//
// Weights of `products` matrices side by side, 2 for a graph convolution and 1 for a linear layer, are
//
//   bfloat16   [block of 8 columns][channel block][lane][product][4]
//   float32    [block of 8 columns][channel block][quarter q][t][column 2][product][4]
//
// The four numbers in bfloat16 are rows 2t, 2t + 1, 2t + 8, 2t + 9 of column lane / 4: the two registers of operand B.
// In float32, where no instruction exchanges numbers, they are rows 2q, 2q + 1, 2q + 8, 2q + 9 of columns 2t and 2t
// + 1.
#pragma once

#include "common/cuda.h"
#include "common/cuda_storage.h"
#include "engine/cuda/engine_cuda.h"

namespace diffupose {

constexpr int kWarpSize = 32;
constexpr int kRecord = 8;  // numbers that a lane holds of a channel block

struct Lane {
    int index, pose, quarter;
};

__device__ inline Lane this_lane() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    return {lane, lane / 4, lane % 4};
}

// Index of the first number that a lane holds of a pair and a channel block.
__device__ inline int record_index(int pair, int channel_block, int channel_blocks, int lane) {
    return ((pair * channel_blocks + channel_block) * kWarpSize + lane) * kRecord;
}

// Index of one number.
__device__ inline int element_index(int joint, int pose, int channel, int channel_blocks) {
    const int channel_block = channel / kChannelBlock, in_channel_block = channel % kChannelBlock;
    const int lane = 4 * pose + in_channel_block % 8 / 2;
    return record_index(joint / 2, channel_block, channel_blocks, lane) + in_channel_block / 8 * 4 + joint % 2 * 2 +
           channel % 2;
}

template <typename T>
__device__ inline T* at(unsigned char* memory, int64_t offset) {
    return reinterpret_cast<T*>(memory + offset);
}

// --- Storage ---------------------------------------------------------------------------------------------------------

// Two numbers as bfloat16, rounded to nearest even, the first in the low half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
#ifdef __CUDA_ARCH__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return from_float<Bfloat16>(low).bits | static_cast<uint32_t>(from_float<Bfloat16>(high).bits) << 16;
#endif
}

template <typename T>
__device__ inline void load4(const T* from, float* to) {
    load(from, reinterpret_cast<float (&)[4]>(*to));
}
// A whole record.
template <typename T>
__device__ inline void load8(const T* from, float* to) {
    load(from, reinterpret_cast<float (&)[8]>(*to));
}

__device__ inline void store4(float* to, const float* from) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ inline void store4(Bfloat16* to, const float* from) {
    *reinterpret_cast<uint2*>(to) = {pack_bfloat16(from[0], from[1]), pack_bfloat16(from[2], from[3])};
}
__device__ inline void store8(float* to, const float* from) { store4(to, from), store4(to + 4, from + 4); }
__device__ inline void store8(Bfloat16* to, const float* from) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_bfloat16(from[0], from[1]), pack_bfloat16(from[2], from[3]),
                                               pack_bfloat16(from[4], from[5]), pack_bfloat16(from[6], from[7]));
}

// --- Products --------------------------------------------------------------------------------------------------------

// sum += A B of one m16n8k16 product; the operands are spread over the warp as the layouts above say.
__device__ inline void multiply(float* sum, uint4 a, uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#elif !defined(__CUDACC__)
    const uint32_t mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
    emulation::WarpWords all;
    emulation::exchange(0xffffffffu, mine, 6, all);
    const int lane = emulation::lane(), row = lane / 4, first = lane % 4 * 2;
    const auto number = [](uint32_t word, int half) { return float_of(half ? word & 0xffff0000u : word << 16); };
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            // Register of A: the lower rows first, then the upper channels; of B: the upper channels.
            const float from_a = number(all[4 * row + k % 8 / 2][i / 2 + k / 8 * 2], k % 2);
            const float from_b = number(all[4 * (first + i % 2) + k % 8 / 2][4 + k / 8], k % 2);
            sum[i] += from_a * from_b;
        }
    }
#endif
}

}  // namespace diffupose
