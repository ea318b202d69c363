// Grids and indices of kernels in which each thread loops over some elements of a long list; and a division by three
// instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda.h"

namespace diffupose {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU many times over. The loop over elements does the rest.
constexpr int64_t kMaxBlocks = 1 << 16;

inline unsigned grid_for(int64_t elements) {
    return static_cast<unsigned>(std::min((elements + kThreads - 1) / kThreads, kMaxBlocks));
}

__device__ inline int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t index_stride() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// n / d of whole numbers below 2^20, from 1 / d. The added half keeps the value away from whole numbers, farther than
// rounding moves it.
__device__ __forceinline__ int quotient_of(int n, float per_d) {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * per_d);
}

}  // namespace diffupose
