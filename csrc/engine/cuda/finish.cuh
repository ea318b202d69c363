// How a layer ends, for one number: film(activation(sum + bias) + residual). All families of kernels share these
// formulas; how they hold sums and load the rest is their own.
//
// The CPU engine has the same formulas over vectors (cpu/kernels_isa.cpp). It cannot include them from here: code for
// an instruction set must not instantiate what lies outside of its namespace (common/isa.h).
#pragma once

#include <type_traits>

#include "common/activation.h"
#include "common/cuda.h"

namespace diffupose {

template <Activation kActivation>
__device__ inline float activate(float x) {
    if constexpr (kActivation == Activation::relu) return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    if constexpr (kActivation == Activation::gelu) return 0.5f * x * (1.0f + erff(x * 0.707106781186547524f));
    return x;
}

// ReLU without a branch where another activation would be none: max(x, lowest) with `lowest` 0 or minus infinity.
__device__ inline float lowest_of(Activation activation) { return activation == Activation::relu ? 0.0f : -INFINITY; }
__device__ inline float at_least(float x, float lowest) { return x < lowest ? lowest : x; }  // NaN stays NaN

// Calls function(std::integral_constant of the activation): each activation is a piece of code of its own. Unrolled
// over all joints, all of them together would not fit the instruction cache.
template <typename Function>
__device__ inline void with_activation(Activation activation, const Function& function) {
    if (activation == Activation::relu) {
        function(std::integral_constant<Activation, Activation::relu>{});
    } else if (activation == Activation::gelu) {
        function(std::integral_constant<Activation, Activation::gelu>{});
    } else {
        function(std::integral_constant<Activation, Activation::none>{});
    }
}

// x / (1 + exp(-x)); the quotient within two units in the last place.
__device__ inline float silu(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(x, 1.0f + expf(-x));
#else
    return x / (1.0f + expf(-x));
#endif
}

__device__ inline float film(float x, float scale, float shift) { return silu(x * scale + shift); }

// normalized(x) * scale + shift; or film(x), with mean 0 and factor 1.
__device__ inline float scale_shift(bool normalize, float x, float mean, float factor, float scale, float shift) {
    const float value = (x - mean) * factor * scale + shift;
    return normalize ? value : silu(value);
}

// Everything but FiLM.
template <Activation kActivation>
__device__ inline float finish(float sum, float bias, float residual) {
    return activate<kActivation>(sum + bias) + residual;
}

}  // namespace diffupose
