#include "cuda_cases.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"

namespace diffupose::cases {

namespace {

struct Moments {
    DeviceArray<float> mean, covariance;
    explicit Moments(const HypothesisSizes& sizes)
        : mean(3 * sizes.num_frames * sizes.num_joints), covariance(9 * sizes.num_frames * sizes.num_joints) {}
};

// Against the C++ code.
void check(const HypothesisSizes& sizes) {
    const int64_t joints = sizes.num_frames * sizes.num_joints, numel = 3 * sizes.num_joints;
    const auto noise = normal(3 * sizes.num_hypotheses * joints, 0.05f), pose = normal(3 * joints, 0.4f);
    DeviceArray<float> poses(noise.size());
    for (int64_t i = 0; i < poses.size(); ++i) {
        const int64_t frame = i / (numel * sizes.num_hypotheses);
        poses[i] = noise[i] + pose[frame * numel + i % numel];
    }
    Moments got(sizes), expected(sizes);
    launch_hypothesis_statistics(poses.data(), {}, expected.mean.data(), expected.covariance.data(), nullptr, nullptr,
                                 sizes, 1);
    launch_hypothesis_statistics_cuda(poses.data(), got.mean.data(), got.covariance.data(), sizes, nullptr);
    expect_near("mean", got.mean, expected.mean, 1e-5);
    expect_near("covariance", got.covariance, expected.covariance, 1e-5);
}

}  // namespace

// Frames in shared memory: one thread for a joint of a frame, in two blocks; several, and no multiple of 16 bytes; an
// even number of numbers a pose.
CUDA_CASE(hypothesis_statistics) {
    check({14, 8, 17});
    check({2, 33, 17});
    check({3, 70, 5});
    check({1, 5, 64});
}

// More than fit shared memory.
CUDA_CASE(hypothesis_statistics_of_many) {
    check({1, 483, 17});
    check({3, 530, 17});
}

}  // namespace diffupose::cases
