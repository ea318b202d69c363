#include "cuda_cases.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"

namespace diffupose::cases {

namespace {

struct Statistics {
    DeviceArray<float> mean, covariance, weights, weighted_mean;
    explicit Statistics(const HypothesisSizes& sizes)
        : mean(3 * sizes.num_frames * sizes.num_joints),
          covariance(9 * sizes.num_frames * sizes.num_joints),
          weights(sizes.num_frames * sizes.num_hypotheses),
          weighted_mean(3 * sizes.num_frames * sizes.num_joints) {}
};

// Against the C++ code, the view in float64 or, where rounded, in float32.
void check(const HypothesisSizes& sizes, bool rounded) {
    const int64_t joints = sizes.num_frames * sizes.num_joints;
    const auto noise = normal(3 * sizes.num_hypotheses * joints, 0.05f), pose = normal(3 * joints, 0.4f);
    DeviceArray<float> poses(noise.size());
    DeviceArray<double> keypoints(2 * joints), confidence(joints), camera(4), intrinsics(9);
    const int64_t numel = 3 * sizes.num_joints;
    for (int64_t i = 0; i < poses.size(); ++i) {
        const int64_t frame = i / (numel * sizes.num_hypotheses);
        poses[i] = noise[i] + pose[frame * numel + i % numel];
    }
    camera[0] = 1100.0, camera[1] = 1000.0, camera[2] = 500.0, camera[3] = 400.0;
    intrinsics[0] = camera[0], intrinsics[4] = camera[1], intrinsics[2] = camera[2], intrinsics[5] = camera[3];
    DeviceArray<float> keypoints_float(2 * joints), confidence_float(joints), intrinsics_float(9);
    for (int64_t i = 0; i < 9; ++i) intrinsics_float[i] = static_cast<float>(intrinsics[i]);
    for (int64_t j = 0; j < joints; ++j) {
        const double z = static_cast<double>(pose[3 * j + 2]) + 4.0;
        keypoints[2 * j] = camera[0] * static_cast<double>(pose[3 * j]) / z + camera[2] + 3.0;
        keypoints[2 * j + 1] = camera[1] * static_cast<double>(pose[3 * j + 1]) / z + camera[3];
        confidence[j] = j % 5 == 3 ? 0.0 : 0.9;
        for (int64_t i : {2 * j, 2 * j + 1}) {
            keypoints_float[i] = static_cast<float>(keypoints[i]);
            if (rounded) keypoints[i] = static_cast<double>(keypoints_float[i]);
        }
        confidence_float[j] = static_cast<float>(confidence[j]);
        if (rounded) confidence[j] = static_cast<double>(confidence_float[j]);
    }
    const Reprojection seen = {keypoints.data(), confidence.data(), camera.data(), true, 0.8f, 0.02f};
    CudaReprojection view = {keypoints.data(), confidence.data(), intrinsics.data(), true, true, 0.8f, 0.02f};
    if (rounded) {
        view.keypoints_2d = keypoints_float.data(), view.confidence = confidence_float.data();
        view.intrinsics = intrinsics_float.data(), view.float64 = false;
    }
    Statistics got(sizes), expected(sizes);
    launch_hypothesis_statistics(poses.data(), seen, expected.mean.data(), expected.covariance.data(),
                                 expected.weights.data(), expected.weighted_mean.data(), sizes, 1);
    launch_hypothesis_statistics_cuda(
        poses.data(), view, {got.mean.data(), got.covariance.data(), got.weights.data(), got.weighted_mean.data()},
        sizes, nullptr);
    expect_near("mean", got.mean, expected.mean, 1e-5);
    expect_near("covariance", got.covariance, expected.covariance, 1e-5);
    expect_near("weights", got.weights, expected.weights, 2e-5);
    expect_near("weighted_mean", got.weighted_mean, expected.weighted_mean, 2e-5);
    Statistics alone(sizes);  // without a view: a kernel of its own
    launch_hypothesis_statistics_cuda(poses.data(), {}, {alone.mean.data(), alone.covariance.data(), nullptr, nullptr},
                                      sizes, nullptr);
    expect_near("mean alone", alone.mean, expected.mean, 1e-5);
    expect_near("covariance alone", alone.covariance, expected.covariance, 1e-5);
}

}  // namespace

// Frames in shared memory: one thread for a joint of a frame, in two blocks; several, and no multiple of 16 bytes; an
// even number of numbers a pose.
CUDA_CASE(hypothesis_statistics) {
    check({14, 8, 17}, true);
    check({2, 33, 17}, false);
    check({3, 70, 5}, true);
    check({1, 5, 64}, true);
}

// More than fit shared memory; in the second one the roots do not either, and are computed again for each pass.
CUDA_CASE(hypothesis_statistics_of_many) {
    check({1, 480, 17}, true);
    check({1, 530, 17}, false);
}

}  // namespace diffupose::cases
