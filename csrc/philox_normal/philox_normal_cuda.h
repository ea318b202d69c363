// philox_normal on the GPU; see philox_normal.h.
#pragma once

#include "philox_normal/philox_normal.h"

namespace diffupose {

// All pointers are on the device.
void launch_philox_normal_cuda(uint64_t seed, const int64_t* frame_ids, const int64_t* hypothesis_ids, uint32_t step,
                               float* out, PhiloxNormalSizes sizes, void* stream);

}  // namespace diffupose
