// hypothesis_statistics on the GPU; see hypothesis_statistics.h.
#pragma once

#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {

constexpr int64_t kCudaStatisticsMaxJoints = 64;

// What is seen of the frames, as callers have it: nothing is copied to convert it.
struct CudaReprojection {
    const void* keypoints_2d;  // [B, J, 2] pixels, or null
    const void* confidence;    // [B, J], 0 where missing
    const void* intrinsics;    // [B, 3, 3] in pixels; or [3, 3] where it is shared
    bool float64;              // else these are float32
    bool shared_camera;
    float weight;       // of the way to the viewing ray that the keypoint deserves
    float temperature;  // in sides of the keypoints' box
};

struct StatisticsOutputs {
    float* mean;           // [B, J, 3]
    float* covariance;     // [B, J, 3, 3]
    float* weights;        // [B, H], with keypoints
    float* weighted_mean;  // [B, J, 3], with keypoints
};

// All pointers are on the device. A frame's result is the same bit for bit at every call and whatever stands beside it.
void launch_hypothesis_statistics_cuda(const float* hypotheses, const CudaReprojection& view,
                                       const StatisticsOutputs& outputs, HypothesisSizes sizes, void* stream);

}  // namespace diffupose
