#include "cuda_cases.h"
#include "philox_normal/philox_normal_cuda.h"

namespace diffupose::cases {

CUDA_CASE(philox_normal) {
    for (const PhiloxNormalSizes& sizes : {PhiloxNormalSizes{1, 1, 1}, {3, 5, 51}, {7, 1, 48}, {2, 33, 6}}) {
        const auto frames = random_ids(sizes.num_frames), hypotheses = random_ids(sizes.num_hypotheses);
        DeviceArray<float> out(sizes.num_frames * sizes.num_hypotheses * sizes.num_elements), expected(out.size());
        launch_philox_normal_cuda(~uint64_t{4}, frames.data(), hypotheses.data(), 9, out.data(), sizes, nullptr);
        launch_philox_normal(~uint64_t{4}, frames.data(), hypotheses.data(), 9, expected.data(), sizes, 1);
        expect_near("out", out, expected, 2e-6);
    }
}

}  // namespace diffupose::cases
