// Vectors of float32 from and to arrays of float32 or bfloat16, whole or cut off at an array's end.
#pragma once

#include "common/bfloat16.h"
#include "common/vec.h"

namespace diffupose {
namespace DIFFUPOSE_ISA {

typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

static inline Vec load(const Bfloat16* p) {
    HalfVec bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return reinterpret_cast<Vec>(__builtin_convertvector(bits, UnsignedVec) << 16);
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
static inline void store(Bfloat16* p, Vec v) {
    const UnsignedVec bits = reinterpret_cast<UnsignedVec>(v);
    const UnsignedVec is_nan = reinterpret_cast<UnsignedVec>(v != v);
    const UnsignedVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    const HalfVec half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HalfVec);
    __builtin_memcpy(p, &half, sizeof(half));
}

// The first `count` elements, and zeros in the other lanes. It never reads beyond them.
template <typename T>
static inline Vec load_some(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    T elements[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = p[i];
    return load(elements);
}

template <typename T>
static inline void store_some(T* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(p, v);
    T elements[kLanes];
    store(elements, v);
    for (int64_t i = 0; i < count; ++i) p[i] = elements[i];
}

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
