// Asynchronous copies from global to shared memory.
#pragma once

#include "common/cuda.h"
#include "common/cuda_storage.h"

namespace diffupose {

// Copies 4 or 16 bytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(float* to, const float* from) {
    check_alignment<kBytes>(to);
    check_alignment<kBytes>(from);
#ifdef __CUDACC__
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
    }
#else
    emulation::copy_async(to, from, kBytes);
#endif
}

// Waits for all copies of this thread. Other threads see the data after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    emulation::wait_for_copies();
#endif
}

}  // namespace diffupose
