// hypothesis_statistics: mean and unbiased covariance of every joint over the hypotheses. With 2D keypoints (a view)
// also a weight for each hypothesis, by how well it projects, and the weighted mean of the hypotheses, each moved
// towards its viewing rays first.
//
// The formulas stand in diffupose/reference/hypothesis_statistics.py.
//
// The CUDA code computes mean and covariance only. With keypoints, a GPU takes Triton or PyTorch. On an H200 a lift of
// 100,000 frames of 10 hypotheses takes about 2,750 ms. The weights and the weighted mean of these frames took 0.17 ms
// in CUDA, 0.31 ms in Triton and 15.6 ms in PyTorch: 0.01 %, 0.01 % and 0.6 % of the lift that they follow.
#pragma once

#include <cstdint>

namespace diffupose {

// With fewer hypotheses the covariance is NaN: they cannot span 3D.
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
    float weight;       // part of the way to its viewing ray that a joint moves at most
    float temperature;  // in sides of the keypoints' box
};

// A frame's result has the same bits for any num_threads and any batch.
void launch_hypothesis_statistics(const float* hypotheses,  // [B, H, J, 3]
                                  const Reprojection& reprojection,
                                  float* mean,           // [B, J, 3]
                                  float* covariance,     // [B, J, 3, 3]
                                  float* weights,        // [B, H], with keypoints
                                  float* weighted_mean,  // [B, J, 3], with keypoints
                                  HypothesisSizes sizes, int num_threads);

}  // namespace diffupose
