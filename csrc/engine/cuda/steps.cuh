// The ends of a step: what surrounds the layers. `Layout` says where a number of a joint, a pose and a channel lies.
#pragma once

#include "common/cuda.h"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/pair_tasks.cuh"
#include "philox_normal/philox_cuda.cuh"
#include "philox_normal/philox_normal.h"

namespace diffupose {

// That of fragments.cuh.
struct PairLayout {
    __device__ static int index(int joint, int pose, int channel, int steps) {
        return element_index(joint, pose, channel, steps);
    }
};

// What all kernels know of the program.
struct Shape {
    int joints, condition_channels, input_steps, output_steps, output_channels;
    int64_t input, output;
};

inline Shape shape_of(const CudaProgram& program) {
    const auto steps = [](int channels) { return (channels + kStepChannels - 1) / kStepChannels; };
    return {program.num_joints,
            program.num_condition_channels,
            steps(3 + program.num_condition_channels),
            steps(program.num_output_channels),
            program.num_output_channels,
            program.input,
            program.output};
}

inline int64_t num_tiles(int64_t poses) { return (poses + kTilePoses - 1) / kTilePoses; }

// The input buffer of a tile: x_t beside the condition; 0 in padded channels, joints and poses. `poses_per_condition`
// poses, one after the other, share a row of the condition; `joints` with the padded ones.
template <typename T, typename Layout>
__device__ __noinline__ void fill_input(const Shape& shape, unsigned char* memory, const float* x,
                                        const float* condition, int64_t first_pose, int64_t num_poses,
                                        int64_t poses_per_condition, int joints, int thread, int threads) {
    T* input = at<T>(memory, shape.input);
    const int channels = shape.input_steps * kStepChannels;
    for (int i = thread; i < joints * kTilePoses * channels; i += threads) {
        const int channel = i % channels, joint = i / channels % joints, in_tile = i / channels / joints;
        const int64_t pose = first_pose + in_tile;
        float value = 0.0f;
        if (pose < num_poses && joint < shape.joints && channel < 3 + shape.condition_channels) {
            const int64_t row = pose / poses_per_condition * shape.joints + joint;
            value = channel < 3 ? x[(pose * shape.joints + joint) * 3 + channel]
                                : condition[row * shape.condition_channels + channel - 3];
        }
        store1(input + Layout::index(joint, in_tile, channel, shape.input_steps), value);
    }
}

__device__ inline PhiloxKey key_of(const int64_t* seed) {
    const auto bits = static_cast<uint64_t>(*seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// Four elements of a pose's noise.
__device__ inline void draw(const CudaSampleArgs& args, PhiloxKey key, int64_t pose, uint32_t step, int block,
                            float* z) {
    const auto frame = static_cast<uint64_t>(args.frame_ids[pose / args.num_hypotheses]);
    const auto id = static_cast<uint32_t>(args.hypothesis_ids[pose % args.num_hypotheses]);
    philox_normal_block_cuda(key, frame, id, step, static_cast<uint32_t>(block), z);
}

// x_T of a tile.
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

// One step of the reverse process of a tile, in place in args.out (see reverse_step_row.h). A term whose coefficient is
// 0 is skipped, so that a NaN in it does not matter.
template <typename Layout>
__device__ __noinline__ void reverse_step(const Shape& shape, const CudaSampleArgs& args, unsigned char* memory,
                                          int64_t first_pose, int step, int thread, int threads) {
    const int elements = 3 * shape.joints, blocks = (elements + 3) / 4;
    const int64_t num_poses = args.num_frames * args.num_hypotheses;
    const float* output = at<const float>(memory, shape.output);
    const float* row = args.coefficients + 6 * step;
    const float p = row[0], q = row[1], c_x = row[2], c_0 = row[3], c_1 = row[4], s = row[5];
    const PhiloxKey key = key_of(args.seed);
    for (int i = thread; i < kTilePoses * blocks; i += threads) {
        const int in_tile = i / blocks, block = i % blocks;
        const int64_t pose = first_pose + in_tile;
        if (pose >= num_poses) continue;
        float z[4] = {};
        if (s != 0.0f) draw(args, key, pose, static_cast<uint32_t>(step), block, z);
        for (int k = 0; k < 4; ++k) {
            const int element = 4 * block + k;
            if (element >= elements) continue;
            const int64_t index = pose * elements + element;
            const float x_t = args.out[index];
            float x0 = 0.0f, next = 0.0f;
            if (q != 0.0f) x0 = q * output[Layout::index(element / 3, in_tile, element % 3, shape.output_steps)];
            if (p != 0.0f) x0 = p * x_t + x0;
            x0 = x0 > args.clip ? args.clip : (x0 < -args.clip ? -args.clip : x0);  // NaN stays NaN
            if (c_x != 0.0f) next += c_x * x_t;
            if (c_0 != 0.0f) next += c_0 * x0;
            if (c_1 != 0.0f) next += c_1 * args.x0_last[index];
            if (s != 0.0f) {
                const float scale = args.noise_scale == nullptr ? 1.0f : args.noise_scale[step * elements + element];
                next += s * (scale * z[k]);
            }
            args.out[index] = next;
            if (args.x0_last != nullptr) args.x0_last[index] = x0;
        }
    }
}

}  // namespace diffupose
