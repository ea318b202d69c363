// Functions that the hardware computes in one instruction, with errors in the last bit or two. Tiny numbers count as 0.
#pragma once

#include <cmath>

#include "common/cuda.h"

namespace diffupose {

// 1 / x, with an error in the last bit. Infinity for tiny x.
__device__ __forceinline__ float nearly_inverse(float x) {
#ifdef __CUDACC__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

// The square root, with an error in the last bit. Zero for tiny x.
__device__ __forceinline__ float nearly_root(float x) {
#ifdef __CUDACC__
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::sqrt(x);
#endif
}

// 1 / sqrt(x) for x > 0, with an error in the last bit or two.
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
