// What surrounds the layers of a step: the input buffer, the noise and the reverse step. `Layout::index` is the index
// of a number in memory.
#pragma once

#include "common/cuda.h"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/fragments.cuh"
#include "philox_normal/philox_cuda.cuh"
#include "philox_normal/philox_normal.h"
#include "reverse_step/reverse_step_element.h"

namespace diffupose {

// The layout of fragments.cuh.
struct PairLayout {
    __device__ static int index(int joint, int pose, int channel, int channel_blocks) {
        return element_index(joint, pose, channel, channel_blocks);
    }
};

// What kernels need of the program.
struct Shape {
    int joints, condition_channels, input_blocks, output_blocks, output_channels;
    int64_t input, output;
};

inline Shape shape_of(const CudaProgram& program) {
    const auto channel_blocks = [](int channels) { return (channels + kChannelBlock - 1) / kChannelBlock; };
    return {program.num_joints,
            program.num_condition_channels,
            channel_blocks(3 + program.num_condition_channels),
            channel_blocks(program.num_output_channels),
            program.num_output_channels,
            program.input,
            program.output};
}

inline int64_t num_tiles(int64_t poses) { return (poses + kTilePoses - 1) / kTilePoses; }

// Fills the input buffer of a pose tile: x_t beside the condition, and 0 in padded channels, joints and poses. A row of
// the condition serves `poses_per_condition` consecutive poses. `joints` counts padded joints, too.
template <typename T, typename Layout>
__device__ __noinline__ void fill_input(const Shape& shape, unsigned char* memory, const float* x,
                                        const float* condition, int64_t first_pose, int64_t num_poses,
                                        int64_t poses_per_condition, int joints, int thread, int threads) {
    T* input = at<T>(memory, shape.input);
    const int channels = shape.input_blocks * kChannelBlock;
    for (int i = thread; i < joints * kTilePoses * channels; i += threads) {
        const int channel = i % channels, joint = i / channels % joints, in_tile = i / channels / joints;
        const int64_t pose = first_pose + in_tile;
        float value = 0.0f;
        if (pose < num_poses && joint < shape.joints && channel < 3 + shape.condition_channels) {
            const int64_t row = pose / poses_per_condition * shape.joints + joint;
            value = channel < 3 ? x[(pose * shape.joints + joint) * 3 + channel]
                                : condition[row * shape.condition_channels + channel - 3];
        }
        input[Layout::index(joint, in_tile, channel, shape.input_blocks)] = from_float<T>(value);
    }
}

__device__ inline PhiloxKey key_of(const int64_t* seed) {
    const auto bits = static_cast<uint64_t>(*seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

__device__ inline StepRow step_row(const CudaSampleArgs& args, int step) {
    const float* row = args.coefficients + 6 * step;
    return {row[0], row[1], row[2], row[3], row[4], row[5]};
}

// What an element's noise is multiplied by.
__device__ inline float noise_scale(const CudaSampleArgs& args, int step, int elements, int element) {
    return args.noise_scale == nullptr ? 1.0f : args.noise_scale[step * elements + element];
}

// Four elements of a pose's noise.
__device__ inline void draw(const CudaSampleArgs& args, PhiloxKey key, int64_t pose, uint32_t step, int block,
                            float* z) {
    const auto frame = static_cast<uint64_t>(args.frame_ids[pose / args.num_hypotheses]);
    const auto id = static_cast<uint32_t>(args.hypothesis_ids[pose % args.num_hypotheses]);
    philox_normal_block_cuda(key, frame, id, step, static_cast<uint32_t>(block), z);
}

// Draws x_T of a pose tile.
__device__ __noinline__ inline void draw_initial(const Shape& shape, const CudaSampleArgs& args, int64_t first_pose,
                                                 int thread, int threads) {
    const int elements = 3 * shape.joints, blocks = (elements + 3) / 4;
    const int64_t num_poses = args.num_frames * args.num_hypotheses;
    const PhiloxKey key = key_of(args.seed);
    for (int i = thread; i < kTilePoses * blocks; i += threads) {
        const int64_t pose = first_pose + i / blocks;
        if (pose >= num_poses) continue;
        float z[4];
        draw(args, key, pose, static_cast<uint32_t>(kPhiloxMaxStep), i % blocks, z);
        for (int k = 0; k < 4; ++k) {
            const int element = i % blocks * 4 + k;
            if (element < elements) args.out[pose * elements + element] = z[k];
        }
    }
}

// One step of the reverse process of a pose tile, in place in args.out.
template <typename Layout>
__device__ __noinline__ void reverse_step(const Shape& shape, const CudaSampleArgs& args, unsigned char* memory,
                                          int64_t first_pose, int step, int thread, int threads) {
    const int elements = 3 * shape.joints, blocks = (elements + 3) / 4;
    const int64_t num_poses = args.num_frames * args.num_hypotheses;
    const float* output = at<const float>(memory, shape.output);
    const StepRow row = step_row(args, step);
    const PhiloxKey key = key_of(args.seed);
    for (int i = thread; i < kTilePoses * blocks; i += threads) {
        const int in_tile = i / blocks, block = i % blocks;
        const int64_t pose = first_pose + in_tile;
        if (pose >= num_poses) continue;
        float z[4] = {};
        if (row.s != 0.0f) draw(args, key, pose, static_cast<uint32_t>(step), block, z);
        for (int k = 0; k < 4; ++k) {
            const int element = 4 * block + k;
            if (element >= elements) continue;
            const int64_t index = pose * elements + element;
            const float x_t = args.out[index];
            const float said = output[Layout::index(element / 3, in_tile, element % 3, shape.output_blocks)];
            const float x0 = predicted_x0(row, args.clip, x_t, said);
            const float last = row.c_1 != 0.0f ? args.x0_last[index] : 0.0f;
            const float noise = row.s != 0.0f ? noise_scale(args, step, elements, element) * z[k] : 0.0f;
            args.out[index] = previous_sample(row, x_t, x0, last, noise);
            if (args.x0_last != nullptr) args.x0_last[index] = x0;
        }
    }
}

}  // namespace diffupose
