// Indices: one shape for kernels in which a thread takes some elements of a long list, one after the other, and a
// division that takes three instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda.h"

namespace diffupose {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU of today many times over; the rest is done by the loop over elements.
constexpr int64_t kMaxBlocks = 1 << 16;

inline unsigned grid_for(int64_t elements) {
    return static_cast<unsigned>(std::min((elements + kThreads - 1) / kThreads, kMaxBlocks));
}

__device__ inline int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t index_stride() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// n / d of whole numbers below 2^20, with 1 / d: half a step away from where it would jump, which rounding is not.
__device__ __forceinline__ int quotient_of(int n, float per_d) {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * per_d);
}

}  // namespace diffupose
