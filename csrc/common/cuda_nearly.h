// What the hardware computes in one instruction, but for the last bit or two; tiny numbers count as 0.
#pragma once

#include <cmath>

#include "common/cuda.h"

namespace diffupose {

// 1 / x but for the last bit; of what is next to zero, infinity.
__device__ __forceinline__ float nearly_inverse(float x) {
#ifdef __CUDACC__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

// The square root but for the last bit; of what is next to zero, zero.
__device__ __forceinline__ float nearly_root(float x) {
#ifdef __CUDACC__
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::sqrt(x);
#endif
}

// 1 / sqrt(x), x > 0, but for the last bit or two.
__device__ __forceinline__ float nearly_inverse_root(float x) {
#ifdef __CUDACC__
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / std::sqrt(x);
#endif
}

}  // namespace diffupose
