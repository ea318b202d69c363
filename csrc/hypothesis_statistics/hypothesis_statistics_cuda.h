// hypothesis_statistics on the GPU; see hypothesis_statistics.h.
#pragma once

#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {

constexpr int64_t kCudaStatisticsMaxJoints = 64;

// All pointers are on the device. A frame's result is the same bit for bit at every call and whatever stands beside it.
void launch_hypothesis_statistics_cuda(const float* hypotheses, const Reprojection& reprojection, float* mean,
                                       float* covariance, float* weights, float* weighted_mean, HypothesisSizes sizes,
                                       void* stream);

}  // namespace diffupose
