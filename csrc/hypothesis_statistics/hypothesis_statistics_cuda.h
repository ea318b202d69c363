// Mean and covariance of the hypotheses on the GPU; see hypothesis_statistics.h.
#pragma once

#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {

constexpr int64_t kCudaStatisticsMaxJoints = 64;

// All pointers are on the device. A frame's result has the same bits at every call and in any batch.
void launch_hypothesis_statistics_cuda(const float* hypotheses,  // [B, H, J, 3]
                                       float* mean,              // [B, J, 3]
                                       float* covariance,        // [B, J, 3, 3]
                                       HypothesisSizes sizes, void* stream);

}  // namespace diffupose
