// Chooses the instance of a kernel. Where sizes and alignment allow, the compiler knows the number of joints and a
// thread takes several channels.
#pragma once

#include <stdexcept>

#include "common/cuda_storage.h"
#include "modulated_graph_conv/modulated_graph_conv_cuda.h"

namespace diffupose {

// kJoints is the number of joints, and each access takes 8 bytes of `hidden`. Or it is the largest number of joints,
// and each access takes one channel.
template <int kJointsValue, typename HiddenType, typename OutType>
struct GraphConvInstance {
    static constexpr int kJoints = kJointsValue;
    static constexpr int kChannels = kJoints == kGraphConvMaxJoints ? 1 : 8 / static_cast<int>(sizeof(HiddenType));
    using Hidden = HiddenType;
    using Out = OutType;
};

template <typename Hidden, typename Out, typename Function>
void with_joints(int64_t joints, const Function& function) {
    if (joints == 17) return function(GraphConvInstance<17, Hidden, Out>{});
    if (joints == 16) return function(GraphConvInstance<16, Hidden, Out>{});
    if (joints == 15) return function(GraphConvInstance<15, Hidden, Out>{});
    function(GraphConvInstance<static_cast<int>(kGraphConvMaxJoints), Hidden, Out>{});
}

// Calls function(instance) with the types of both storages. `vectors` says whether every array allows access to four
// channels at once.
template <typename Function>
void with_graph_conv_instance(Storage hidden, Storage out, const GraphConvSizes& sizes, bool vectors,
                              const Function& function) {
    const bool wide = out == Storage::float32;
    if (!wide && out != hidden) throw std::invalid_argument("out must have the storage of hidden, or float32");
    const int64_t joints = vectors ? sizes.num_joints : 0;
    switch (hidden) {
        case Storage::float32:
            return with_joints<float, float>(joints, function);
        case Storage::float16:
            return wide ? with_joints<Float16, float>(joints, function)
                        : with_joints<Float16, Float16>(joints, function);
        case Storage::bfloat16:
            return wide ? with_joints<Bfloat16, float>(joints, function)
                        : with_joints<Bfloat16, Bfloat16>(joints, function);
    }
}

// Whether an array begins at an address that allows access to four channels at once.
inline bool takes_four(const void* address, Storage storage) {
    return storage == Storage::float32 ? is_aligned(static_cast<const float*>(address), 4)
                                       : is_aligned(static_cast<const Bfloat16*>(address), 4);
}

}  // namespace diffupose
