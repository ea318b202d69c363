// Vectors of the instruction set that a *_isa.cpp is compiled for, in the compiler's own vector extension.
#pragma once

#include <cstdint>

#ifndef DIFFUPOSE_ISA
#error "only files named *_isa.cpp include this"
#endif

namespace diffupose {
namespace DIFFUPOSE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
static inline Vec splat(float x) { return Vec{} + x; }

// Lane by lane: mask ? a : b. A comparison of vectors gives such a mask.
static inline Vec select(IntVec mask, Vec a, Vec b) {
    return reinterpret_cast<Vec>((mask & reinterpret_cast<IntVec>(a)) | (~mask & reinterpret_cast<IntVec>(b)));
}

// NaN in `a` stays, as in torch's maximum against a constant.
static inline Vec max(Vec a, Vec b) { return select(a < b, b, a); }
static inline Vec min(Vec a, Vec b) { return select(a > b, b, a); }

// Sums in the order of a tree over halves, the same in every call.
static inline float sum(Vec v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// The first `count` of `kLanes` lanes set.
static inline IntVec first_lanes(int count) {
    IntVec index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    return index < count;
}

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
