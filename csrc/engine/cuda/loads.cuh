// Loads from L2, where a multiprocessor sees what others have written.
#pragma once

#include "common/cuda.h"

namespace diffupose {

// A load, or zeros if it is not `there`. In assembly, since the compiler's code for the C++ waits for each load before
// it issues the next.
__device__ inline uint4 load_if(const uint4* from, bool there) {
#ifdef __CUDA_ARCH__
    uint4 words;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
        : "l"(from), "r"(static_cast<int>(there)));
    return words;
#else
    return there ? __ldcg(from) : uint4{};
#endif
}
__device__ inline uint2 load_if(const uint2* from, bool there) {
#ifdef __CUDA_ARCH__
    uint2 words;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %3, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "@there ld.global.cg.v2.b32 {%0, %1}, [%2];\n"
        "}\n"
        : "=&r"(words.x), "=&r"(words.y)
        : "l"(from), "r"(static_cast<int>(there)));
    return words;
#else
    return there ? __ldcg(from) : uint2{};
#endif
}
__device__ inline float load_if(const float* from, bool there) {
#ifdef __CUDA_ARCH__
    float value;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.s32 there, %2, 0;\n"
        "mov.f32 %0, 0f00000000;\n"
        "@there ld.global.cg.f32 %0, [%1];\n"
        "}\n"
        : "=&f"(value)
        : "l"(from), "r"(static_cast<int>(there)));
    return value;
#else
    return there ? __ldcg(from) : 0.0f;
#endif
}

}  // namespace diffupose
