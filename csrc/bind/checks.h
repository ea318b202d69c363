// What the bindings check: null pointers, sizes, and what the C++ and the CUDA version of an op have in common.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/activation.h"
#include "modulated_graph_conv/modulated_graph_conv.h"
#include "philox_normal/philox_normal.h"
#include "reverse_step/reverse_step.h"

namespace diffupose {

// The address of a tensor's data. A fake tensor's is null, and an empty tensor's may be.
template <typename T>
T* pointer(uintptr_t address, int64_t numel, const char* name) {
    if (address == 0 && numel > 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
    return reinterpret_cast<T*>(address);
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

inline void check_threads(int num_threads) { require(num_threads >= 1, "num_threads must be at least 1"); }

// The number of elements of a tensor. The limit is more than any memory holds: nothing computed from it overflows.
inline int64_t numel_of(std::initializer_list<int64_t> sizes) {
    constexpr int64_t kMost = int64_t{1} << 41;
    int64_t numel = 1;
    for (const int64_t size : sizes) {
        require(size >= 0, "sizes must not be negative");
        require(size <= kMost && (size == 0 || numel <= kMost / size), "sizes must make at most 2^41 numbers");
        numel *= size;
    }
    return numel;
}

// The activation of a layer, none, relu or gelu, by its name.
inline Activation activation_of(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "relu") return Activation::relu;
    require(name == "gelu", "activation must be none, relu or gelu");
    return Activation::gelu;
}

inline GraphConvSizes graph_conv_sizes(int64_t num_poses, int64_t num_joints, int64_t channels) {
    require(num_poses >= 0 && channels >= 1, "num_poses must not be negative, channels must be at least 1");
    require(num_joints >= 1 && num_joints <= kGraphConvMaxJoints, "num_joints must lie in [1, 64]");
    return {num_poses, num_joints, channels};
}

// The numbers in one of the two halves of `hidden`; with both halves they are checked.
inline int64_t numel_of(const GraphConvSizes& sizes) {
    return numel_of({sizes.num_poses, sizes.num_joints, sizes.channels, 2}) / 2;
}

inline PhiloxNormalSizes philox_sizes(int64_t step, int64_t num_frames, int64_t num_hypotheses, int64_t num_elements) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    require(num_elements >= 0 && num_elements <= kPhiloxMaxElements, "num_elements must lie in [0, 262144]");
    require(step >= 0 && step <= kPhiloxMaxStep, "step must lie in [0, 65535]");
    return {num_frames, num_hypotheses, num_elements};
}

inline ReverseStepSizes reverse_step_sizes(int64_t step, int64_t num_frames, int64_t num_hypotheses, int64_t num_joints,
                                           int64_t output_stride) {
    require(num_frames >= 0 && num_hypotheses >= 0 && num_joints >= 0, "sizes must not be negative");
    require(num_joints <= kPhiloxMaxElements / 3, "num_joints must lie in [0, 87381]");
    require(output_stride >= 0, "output_stride must not be negative");
    require(step >= 0 && step < kPhiloxMaxStep, "step must lie in [0, 65534]");
    return {num_frames, num_hypotheses, num_joints, output_stride};
}

}  // namespace diffupose
