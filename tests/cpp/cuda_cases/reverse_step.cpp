#include <limits>

#include "cuda_cases.h"
#include "reverse_step/reverse_step_cuda.h"

namespace diffupose::cases {
namespace {

constexpr float kNoClip = std::numeric_limits<float>::infinity();
constexpr float kRows[2][6] = {{1.0f, 1.0f, 1.0f, 1.0f, 0.0f, 0.0f}, {1.1f, -0.4f, 0.3f, 0.8f, -0.2f, 0.15f}};

enum class Noise { given, drawn };

// Both launchers on the same numbers. With `shift` every array begins one number later: nothing can be accessed several
// at a time. The row comes by value, or with `on_device` from a table that the kernel reads.
void compare(ReverseStepSizes sizes, Noise noise, bool on_device, int shift) {
    const int64_t numel = 3 * sizes.num_frames * sizes.num_hypotheses * sizes.num_joints;
    const auto sample = normal(numel + shift), x0_last = normal(numel + shift), given = normal(numel + shift),
               output = normal(numel / 3 * sizes.output_stride + shift), scale = normal(2 * 3 * sizes.num_joints);
    const auto frames = random_ids(sizes.num_frames), hypotheses = random_ids(sizes.num_hypotheses);
    const uint64_t seed = 0x9E3779B97F4A7C15;
    DeviceArray<float> previous(numel + shift), x0(numel + shift), expected(numel + shift), expected_x0(numel + shift);
    for (DeviceArray<float>* array : {&previous, &x0, &expected, &expected_x0}) {
        for (int i = 0; i < shift; ++i) (*array)[i] = 0.0f;
    }

    DeviceArray<float> table(12);
    std::memcpy(table.data(), kRows, sizeof(kRows));
    DeviceArray<int64_t> index(1);
    index[0] = 1;
    const float* row = kRows[1];
    StepChoice choice = {nullptr, nullptr, {row[0], row[1], row[2], row[3], row[4], row[5]}, 1};
    if (on_device) choice = {table.data(), index.data(), {}, 0};
    const float* const given_noise = noise == Noise::given ? given.data() + shift : nullptr;
    const ReverseStepTensors tensors = {
        Storage::float32, Storage::float32, sample.data() + shift,   output.data() + shift, x0_last.data() + shift,
        given_noise,      scale.data(),     previous.data() + shift, x0.data() + shift,     seed,
        frames.data(),    hypotheses.data()};
    launch_reverse_step_cuda(choice, kNoClip, tensors, sizes, nullptr);
    launch_reverse_step(row, kNoClip, sample.data() + shift, output.data() + shift, x0_last.data() + shift,
                        {given_noise, seed, frames.data(), hypotheses.data(), 1}, scale.data() + 3 * sizes.num_joints,
                        expected.data() + shift, expected_x0.data() + shift, sizes, 1);
    expect_near("prev_sample", previous, expected, 1e-5);
    expect_near("x0", x0, expected_x0, 1e-5);
}

}  // namespace

// 2 * 11 * 51 numbers are one block and less than a block's piece; 3 * 15 * 48 are two blocks, cut inside a pose.
CUDA_CASE(reverse_step) {
    compare({2, 11, 17, 5}, Noise::drawn, false, 0);
    compare({3, 15, 16, 3}, Noise::drawn, true, 0);
    compare({3, 15, 16, 3}, Noise::given, false, 1);
    compare({1, 1, 1, 4}, Noise::drawn, false, 1);
    compare({2, 2100, 1, 3}, Noise::drawn, false, 0);  // more hypotheses than a piece has poses
}

// Two pieces, which are longer here.
CUDA_CASE(reverse_step_bfloat16) {
    const ReverseStepSizes sizes = {3, 30, 17, 3};
    const int64_t numel = 3 * sizes.num_frames * sizes.num_hypotheses * sizes.num_joints;
    const auto sample = as_bfloat16(normal(numel)), output = as_bfloat16(normal(numel));
    const auto frames = random_ids(sizes.num_frames), hypotheses = random_ids(sizes.num_hypotheses);
    DeviceArray<Bfloat16> previous(numel), x0(numel);
    const float row[6] = {1.1f, -0.4f, 0.3f, 0.8f, 0.0f, 0.15f};
    const ReverseStepTensors tensors = {Storage::bfloat16, Storage::bfloat16, sample.data(),   output.data(), nullptr,
                                        nullptr,           nullptr,           previous.data(), x0.data(),     5,
                                        frames.data(),     hypotheses.data()};
    launch_reverse_step_cuda({nullptr, nullptr, {row[0], row[1], row[2], row[3], row[4], row[5]}, 3}, 1.0f, tensors,
                             sizes, nullptr);
    const auto wide_sample = as_float32(sample), wide_output = as_float32(output);
    DeviceArray<float> expected(numel), expected_x0(numel);
    launch_reverse_step(row, 1.0f, wide_sample.data(), wide_output.data(), nullptr,
                        {nullptr, 5, frames.data(), hypotheses.data(), 3}, nullptr, expected.data(), expected_x0.data(),
                        sizes, 1);
    expect_near("prev_sample", as_float32(previous), as_float32(as_bfloat16(expected)), 0.02);
    expect_near("x0", as_float32(x0), as_float32(as_bfloat16(expected_x0)), 0.02);
}

}  // namespace diffupose::cases
