// hypothesis_statistics: mean and unbiased covariance of every joint over the hypotheses, and with 2D keypoints how
// well each hypothesis projects, as a weight, and the weighted mean of the hypotheses moved towards their viewing rays.
//
// The formulas stand in diffupose/reference/hypothesis_statistics.py.
#pragma once

#include <cstdint>

namespace diffupose {

// With fewer the covariance is NaN: they cannot span 3D.
constexpr int64_t kMinHypotheses = 4;

struct HypothesisSizes {
    int64_t num_frames;      // B
    int64_t num_hypotheses;  // H, at least 1
    int64_t num_joints;      // J, at least 1
};

// What is seen of the frames; without keypoints only mean and covariance are computed.
struct Reprojection {
    const double* keypoints_2d;  // [B, J, 2] pixels, or null
    const double* confidence;    // [B, J], 0 where missing
    const double* cameras;       // [B, 4], fx, fy, cx, cy in pixels; or [1, 4] where they are shared
    bool shared_camera;
    float weight;       // of the way to the viewing ray that the keypoint deserves
    float temperature;  // in sides of the keypoints' box
};

// The result is the same bit for bit whatever num_threads is, and a frame's whatever stands beside it.
void launch_hypothesis_statistics(const float* hypotheses,  // [B, H, J, 3]
                                  const Reprojection& reprojection,
                                  float* mean,           // [B, J, 3]
                                  float* covariance,     // [B, J, 3, 3]
                                  float* weights,        // [B, H], with keypoints
                                  float* weighted_mean,  // [B, J, 3], with keypoints
                                  HypothesisSizes sizes, int num_threads);

}  // namespace diffupose
