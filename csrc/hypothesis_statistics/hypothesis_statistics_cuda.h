// hypothesis_statistics on the GPU; see hypothesis_statistics.h.
#pragma once

#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {

constexpr int64_t kCudaStatisticsMaxJoints = 64;

// What is seen of the frames, in the caller's dtype: a conversion would cost a copy.
struct CudaReprojection {
    const void* keypoints_2d;  // [B, J, 2] pixels, or null
    const void* confidence;    // [B, J], 0 where missing
    const void* intrinsics;    // [B, 3, 3] in pixels; or [3, 3] where it is shared
    bool float64;              // otherwise these are float32
    bool shared_camera;
    float weight;       // part of the way to its viewing ray that a joint moves at most
    float temperature;  // in sides of the keypoints' box
};

struct StatisticsOutputs {
    float* mean;           // [B, J, 3]
    float* covariance;     // [B, J, 3, 3]
    float* weights;        // [B, H], with keypoints
    float* weighted_mean;  // [B, J, 3], with keypoints
};

// All pointers are on the device. A frame's result has the same bits at every call and in any batch.
void launch_hypothesis_statistics_cuda(const float* hypotheses, const CudaReprojection& view,
                                       const StatisticsOutputs& outputs, HypothesisSizes sizes, void* stream);

}  // namespace diffupose
