// Numbers in the GPU's memory: float32, float16 or bfloat16, one or several in one access, float32 in registers.
// Rounding is to the nearest, ties to even; what is too large becomes infinite, and NaN stays NaN.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/bfloat16.h"
#include "common/cuda.h"

namespace diffupose {

struct Float16 {
    uint16_t bits;
};

template <typename T>
struct TypeOf {
    using Type = T;
};

// Calls function(TypeOf<T>{}) with the type of a storage, on the host.
template <typename Function>
void with_storage(Storage storage, const Function& function) {
    switch (storage) {
        case Storage::float32:
            return function(TypeOf<float>{});
        case Storage::float16:
            return function(TypeOf<Float16>{});
        case Storage::bfloat16:
            return function(TypeOf<Bfloat16>{});
    }
}

// Whether `count` numbers of T can be accessed at once from here on, on the host.
template <typename T>
bool is_aligned(const T* address, int count) {
    const int bytes = count * static_cast<int>(sizeof(T));
    return reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes < 16 ? bytes : 16) == 0;
}

// --- One number ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
#endif
}

__device__ __forceinline__ float to_float(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

__device__ __forceinline__ float to_float(Float16 value) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(value.bits));
#else
    _Float16 half;
    std::memcpy(&half, &value, 2);
    return static_cast<float>(half);
#endif
}

// from_float<T>(value)
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ Bfloat16 from_float<Bfloat16>(float value) {
#ifdef __CUDACC__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
#ifdef __CUDACC__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const _Float16 half = static_cast<_Float16>(value);
    Float16 result;
    std::memcpy(&result, &half, 2);
    return result;
#endif
}

// --- Several numbers in one access of 2, 4, 8 or 16 bytes
// --------------------------------------------------------------

template <int kBytes>
struct AccessWord;
template <>
struct AccessWord<2> {
    using Type = uint16_t;
};
template <>
struct AccessWord<4> {
    using Type = uint32_t;
};
template <>
struct AccessWord<8> {
    using Type = uint2;
};
template <>
struct AccessWord<16> {
    using Type = uint4;
};

// The elements of the widest access that `count` of them need.
template <typename T, int kCount>
constexpr int kPerAccess = kCount * static_cast<int>(sizeof(T)) < 16 ? kCount : 16 / static_cast<int>(sizeof(T));

// The numbers of one access.
template <typename T, int kAtOnce, typename Word>
__device__ __forceinline__ void expand(Word word, float* to) {
    union {
        Word word;
        T elements[kAtOnce];
        uint32_t pairs[(kAtOnce + 1) / 2];
    } access;
    access.word = word;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        if constexpr (std::is_same_v<T, Bfloat16> && kAtOnce > 1) {
            // One instruction for each half. The compiler would take more for the upper half.
            const uint32_t pair = access.pairs[i / 2];
            to[i] = float_of(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        } else {
            to[i] = to_float(access.elements[i]);
        }
    }
}

template <int kBytes>
__device__ __forceinline__ void check_alignment([[maybe_unused]] const void* address) {
#ifndef __CUDACC__
    emulation::require_aligned(address, kBytes);
#endif
}

// Reads kCount neighbours (1, 2, 4, 8, 16). The address must be a multiple of their size, or of 16 bytes if that is
// less.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
    constexpr int kAtOnce = kPerAccess<T, kCount>;
    using Word = typename AccessWord<kAtOnce* static_cast<int>(sizeof(T))>::Type;
    check_alignment<sizeof(Word)>(from);
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) {
        expand<T, kAtOnce>(*reinterpret_cast<const Word*>(from + first), to + first);
    }
}

// kCount neighbours as they lie in memory: an early load then takes few registers.
template <int kCount, typename T>
struct Packed {
    static constexpr int kAtOnce = kPerAccess<T, kCount>;
    using Word = typename AccessWord<kAtOnce* static_cast<int>(sizeof(T))>::Type;
    Word words[kCount / kAtOnce];
};

template <int kCount, typename T>
__device__ __forceinline__ void load_packed(const T* from, Packed<kCount, T>& to) {
    using Word = typename Packed<kCount, T>::Word;
    check_alignment<sizeof(Word)>(from);
#pragma unroll
    for (int i = 0; i < kCount / Packed<kCount, T>::kAtOnce; ++i) to.words[i] = reinterpret_cast<const Word*>(from)[i];
}

template <int kCount, typename T>
__device__ __forceinline__ void unpack(const Packed<kCount, T>& from, float (&to)[kCount]) {
    constexpr int kAtOnce = Packed<kCount, T>::kAtOnce;
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) expand<T, kAtOnce>(from.words[first / kAtOnce], to + first);
}

// Writes kCount neighbours, aligned likewise.
template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
    constexpr int kAtOnce = kPerAccess<T, kCount>;
    using Word = typename AccessWord<kAtOnce* static_cast<int>(sizeof(T))>::Type;
    check_alignment<sizeof(Word)>(to);
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) {
        union {
            Word word;
            T elements[kAtOnce];
        } access;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) access.elements[i] = from_float<T>(from[first + i]);
        *reinterpret_cast<Word*>(to + first) = access.word;
    }
}

}  // namespace diffupose
