// One shape for kernels in which a thread takes some elements of a long list, one after the other.
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

}  // namespace diffupose
