#include "common/cuda.h"
#include "common/philox.h"
#include "engine/cuda_layers.cuh"
#include "engine/engine_cuda.h"
#include "philox_normal/philox_normal.h"

namespace diffupose {
namespace {

// Warps that share the channels of one product in the kernels of single layers.
constexpr int kSplit = 4;
constexpr int kSplitThreads = kSplit * kWarpSize;
// Warps of a block of the persistent kernel: with two a scheduler, one multiplies while the other mixes joints, and
// each may hold 255 registers.
constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = kPersistentWarps * kWarpSize;

// What all kernels know of the program.
struct Shape {
    int joints, condition_channels, input_steps, output_steps, output_channels;
    int64_t input, output;
};

Shape shape_of(const CudaProgram& program) {
    const auto steps = [](int channels) { return (channels + kStepChannels - 1) / kStepChannels; };
    return {program.num_joints,
            program.num_condition_channels,
            steps(3 + program.num_condition_channels),
            steps(program.num_output_channels),
            program.num_output_channels,
            program.input,
            program.output};
}

// --- Ends of a step: what surrounds the layers -----------------------------------------------------------------------

// The input buffer of a tile: x_t beside the condition; 0 in padded channels, joints and poses. `poses_per_condition`
// poses, one after the other, share a row of the condition.
template <typename T>
__device__ __noinline__ void fill_input(const Shape& shape, unsigned char* memory, const float* x,
                                        const float* condition, int64_t first_pose, int64_t num_poses,
                                        int64_t poses_per_condition, int pairs, int thread, int threads) {
    T* input = at<T>(memory, shape.input);
    const int channels = shape.input_steps * kStepChannels;
    for (int i = thread; i < 2 * pairs * kTilePoses * channels; i += threads) {
        const int channel = i % channels, joint = i / channels % (2 * pairs), in_tile = i / channels / (2 * pairs);
        const int64_t pose = first_pose + in_tile;
        float value = 0.0f;
        if (pose < num_poses && joint < shape.joints && channel < 3 + shape.condition_channels) {
            const int64_t row = pose / poses_per_condition * shape.joints + joint;
            value = channel < 3 ? x[(pose * shape.joints + joint) * 3 + channel]
                                : condition[row * shape.condition_channels + channel - 3];
        }
        store1(input + element_index(joint, in_tile, channel, shape.input_steps), value);
    }
}

__device__ inline PhiloxKey key_of(const int64_t* seed) {
    const auto bits = static_cast<uint64_t>(*seed);
    return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// Four elements of a pose's noise; with antithetic pairs the second of two takes the first one's with the sign changed.
__device__ inline void draw(const CudaSampleArgs& args, PhiloxKey key, int64_t pose, uint32_t step, int block,
                            float* z) {
    const auto frame = static_cast<uint64_t>(args.frame_ids[pose / args.num_hypotheses]);
    const auto id = static_cast<uint32_t>(args.hypothesis_ids[pose % args.num_hypotheses]);
    philox_normal_block(key, frame, args.antithetic ? id / 2 : id, step, static_cast<uint32_t>(block), z);
    if (args.antithetic && id % 2 == 1) {
        for (int i = 0; i < 4; ++i) z[i] = -z[i];
    }
}

// x_T of a tile.
__device__ __noinline__ void draw_initial(const Shape& shape, const CudaSampleArgs& args, int64_t first_pose,
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
            if (q != 0.0f) x0 = q * output[element_index(element / 3, in_tile, element % 3, shape.output_steps)];
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

// --- One kernel for each layer ---------------------------------------------------------------------------------------

template <typename T, int kPairs, int kProducts>
__global__ void __launch_bounds__(kSplitThreads, 2)
    product_kernel(LayerRecord layer, unsigned char* workspace, int64_t tile_bytes, const float* parameters) {
    // As many sums as a lane has, of every warp but the first.
    __shared__ float shared[(kSplit - 1) * kPairs * kProducts * 4 * kWarpSize];
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    shared_product_task<T, kPairs, kProducts, 1, kSplit>(layer, workspace + blockIdx.x * tile_bytes, parameters,
                                                         static_cast<int>(blockIdx.y), shared, warp, this_lane());
}

// The other layers: a warp for each task, kSplit tasks a block.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kSplitThreads)
    task_kernel(LayerRecord layer, unsigned char* workspace, int64_t tile_bytes, int joints, int num_tasks,
                const float* parameters) {
    unsigned char* memory = workspace + blockIdx.x * tile_bytes;
    const int task = static_cast<int>(blockIdx.y) * kSplit + static_cast<int>(threadIdx.x) / kWarpSize;
    if (task >= num_tasks) return;
    if (layer.kind == LayerKind::scale_shift) {
        scale_shift_task<T>(layer, memory, parameters, task, this_lane());
    } else if (layer.kind == LayerKind::attention_weights) {
        attention_weights_task<T, kPairs>(layer, memory, joints, task / kPairs, task % kPairs, this_lane());
    } else {
        attention_apply_task<T, kPairs>(layer, memory, task, this_lane());
    }
}

template <typename T>
__global__ void __launch_bounds__(kSplitThreads)
    fill_kernel(const __grid_constant__ Shape shape, unsigned char* workspace, int64_t tile_bytes, const float* x,
                const float* condition, int64_t num_poses, int64_t poses_per_condition, int pairs) {
    fill_input<T>(shape, workspace + blockIdx.x * tile_bytes, x, condition, int64_t{kTilePoses} * blockIdx.x, num_poses,
                  poses_per_condition, pairs, static_cast<int>(threadIdx.x), kSplitThreads);
}

__global__ void __launch_bounds__(kSplitThreads)
    draw_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args) {
    draw_initial(shape, args, int64_t{kTilePoses} * blockIdx.x, static_cast<int>(threadIdx.x), kSplitThreads);
}

// The end of a step, and the beginning of the next one.
template <typename T>
__global__ void __launch_bounds__(kSplitThreads)
    step_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args,
                unsigned char* workspace, int64_t tile_bytes, int step, int pairs) {
    unsigned char* memory = workspace + blockIdx.x * tile_bytes;
    const int64_t first_pose = int64_t{kTilePoses} * blockIdx.x;
    reverse_step(shape, args, memory, first_pose, step, static_cast<int>(threadIdx.x), kSplitThreads);
    if (step + 1 == args.num_steps) return;
    __syncthreads();
    fill_input<T>(shape, memory, args.out, args.condition, first_pose, args.num_frames * args.num_hypotheses,
                  args.num_hypotheses, pairs, static_cast<int>(threadIdx.x), kSplitThreads);
}

__global__ void __launch_bounds__(kSplitThreads)
    output_kernel(Shape shape, unsigned char* workspace, int64_t tile_bytes, int64_t num_poses, float* out) {
    const float* output = at<const float>(workspace + blockIdx.x * tile_bytes, shape.output);
    const int row = shape.joints * shape.output_channels;
    for (int i = static_cast<int>(threadIdx.x); i < kTilePoses * row; i += kSplitThreads) {
        const int64_t pose = int64_t{kTilePoses} * blockIdx.x + i / row;
        const int joint = i % row / shape.output_channels, channel = i % shape.output_channels;
        if (pose < num_poses) {
            out[pose * row + i % row] = output[element_index(joint, i / row, channel, shape.output_steps)];
        }
    }
}

int64_t num_tiles(int64_t poses) { return (poses + kTilePoses - 1) / kTilePoses; }

template <typename T, int kPairs>
void launch_layers(const CudaProgram& program, unsigned char* workspace, int64_t tiles, const float* parameters,
                   void* stream) {
    const auto grid = static_cast<unsigned>(tiles);
    for (int i = 0; i < program.num_layers; ++i) {
        const LayerRecord& layer = program.layers[i];
        const auto blocks = static_cast<unsigned>(2 * layer.output_steps);
        if (layer.kind == LayerKind::graph_conv) {
            const auto kernel = product_kernel<T, kPairs, 2>;
            DIFFUPOSE_LAUNCH(kernel, dim3(grid, blocks), kSplitThreads, 0, stream, layer, workspace, program.tile_bytes,
                             parameters);
        } else if (layer.kind == LayerKind::linear) {
            const auto kernel = product_kernel<T, kPairs, 1>;
            DIFFUPOSE_LAUNCH(kernel, dim3(grid, blocks), kSplitThreads, 0, stream, layer, workspace, program.tile_bytes,
                             parameters);
        } else {
            const int tasks = layer.kind == LayerKind::scale_shift         ? kPairs
                              : layer.kind == LayerKind::attention_weights ? layer.num_heads * kPairs
                                                                           : layer.output_steps;
            const auto kernel = task_kernel<T, kPairs>;
            DIFFUPOSE_LAUNCH(kernel, dim3(grid, static_cast<unsigned>((tasks + kSplit - 1) / kSplit)), kSplitThreads, 0,
                             stream, layer, workspace, program.tile_bytes, program.num_joints, tasks, parameters);
        }
        check_launch("a layer");
    }
}

template <typename T, int kPairs>
void denoise(const CudaProgram& program, const CudaDenoiseArgs& args, unsigned char* workspace, void* stream) {
    const Shape shape = shape_of(program);
    const int64_t tiles = num_tiles(args.num_poses);
    const auto grid = static_cast<unsigned>(tiles);
    const auto fill = fill_kernel<T>;
    DIFFUPOSE_LAUNCH(fill, grid, kSplitThreads, 0, stream, shape, workspace, program.tile_bytes, args.sample,
                     args.condition, args.num_poses, int64_t{1}, kPairs);
    check_launch("fill_kernel");
    launch_layers<T, kPairs>(program, workspace, tiles, args.parameters, stream);
    DIFFUPOSE_LAUNCH(output_kernel, grid, kSplitThreads, 0, stream, shape, workspace, program.tile_bytes,
                     args.num_poses, args.out);
    check_launch("output_kernel");
}

template <typename T, int kPairs>
void sample_layers(const CudaProgram& program, const CudaSampleArgs& args, unsigned char* workspace, void* stream) {
    const Shape shape = shape_of(program);
    const int64_t poses = args.num_frames * args.num_hypotheses, tiles = num_tiles(poses);
    const auto grid = static_cast<unsigned>(tiles);
    DIFFUPOSE_LAUNCH(draw_kernel, grid, kSplitThreads, 0, stream, shape, args);
    check_launch("draw_kernel");
    const auto fill = fill_kernel<T>;
    DIFFUPOSE_LAUNCH(fill, grid, kSplitThreads, 0, stream, shape, workspace, program.tile_bytes, args.out,
                     args.condition, poses, args.num_hypotheses, kPairs);
    check_launch("fill_kernel");
    const auto end = step_kernel<T>;
    for (int step = 0; step < args.num_steps; ++step) {
        launch_layers<T, kPairs>(program, workspace, tiles, args.parameters + step * args.num_parameters, stream);
        DIFFUPOSE_LAUNCH(end, grid, kSplitThreads, 0, stream, shape, args, workspace, program.tile_bytes, step, kPairs);
        check_launch("step_kernel");
    }
}

// --- One kernel for everything ---------------------------------------------------------------------------------------

template <int kPairs>
__device__ void run_layer(const LayerRecord& layer, unsigned char* memory, int joints, const float* parameters) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const Lane lane = this_lane();
    if (layer.kind == LayerKind::graph_conv) {
        for (int i = warp; i < layer.output_steps; i += kPersistentWarps) {
            product_task<Bfloat16, kPairs, 2, 2>(layer, memory, parameters, 2 * i, lane);
        }
    } else if (layer.kind == LayerKind::linear) {
        for (int i = warp; i < layer.output_steps; i += kPersistentWarps) {
            product_task<Bfloat16, kPairs, 1, 2>(layer, memory, parameters, 2 * i, lane);
        }
    } else if (layer.kind == LayerKind::scale_shift) {
        for (int i = warp; i < kPairs; i += kPersistentWarps) {
            scale_shift_task<Bfloat16>(layer, memory, parameters, i, lane);
        }
    } else if (layer.kind == LayerKind::attention_weights) {
        for (int i = warp; i < layer.num_heads * kPairs; i += kPersistentWarps) {
            attention_weights_task<Bfloat16, kPairs>(layer, memory, joints, i / kPairs, i % kPairs, lane);
        }
    } else {
        for (int i = warp; i < layer.output_steps; i += kPersistentWarps) {
            attention_apply_task<Bfloat16, kPairs>(layer, memory, i, lane);
        }
    }
}

template <int kPairs>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    sample_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args,
                  const LayerRecord* layers, int num_layers, unsigned num_tiles) {
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    for (unsigned tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        draw_initial(shape, args, int64_t{kTilePoses} * tile, static_cast<int>(threadIdx.x), kPersistentThreads);
        for (int step = 0; step < args.num_steps; ++step) {
            __syncthreads();
            fill_input<Bfloat16>(shape, memory, args.out, args.condition, int64_t{kTilePoses} * tile,
                                 args.num_frames * args.num_hypotheses, args.num_hypotheses, kPairs,
                                 static_cast<int>(threadIdx.x), kPersistentThreads);
            for (int i = 0; i < num_layers; ++i) {
                __syncthreads();
                run_layer<kPairs>(layers[i], memory, shape.joints, args.parameters + step * args.num_parameters);
            }
            __syncthreads();
            reverse_step(shape, args, memory, int64_t{kTilePoses} * tile, step, static_cast<int>(threadIdx.x),
                         kPersistentThreads);
        }
    }
}

template <int kPairs>
void sample_persistent(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream) {
    const auto kernel = sample_kernel<kPairs>;
    const int64_t tiles = num_tiles(args.num_frames * args.num_hypotheses);
    allow_shared_bytes(kernel, static_cast<int>(program.tile_bytes));
    const auto grid = static_cast<unsigned>(tiles < num_blocks ? tiles : num_blocks);
    DIFFUPOSE_LAUNCH(kernel, grid, kPersistentThreads, static_cast<int>(program.tile_bytes), stream, shape_of(program),
                     args, program.layers_cuda, program.num_layers, static_cast<unsigned>(tiles));
    check_launch("sample_kernel");
}

}  // namespace

void launch_denoise(const CudaProgram& program, const CudaDenoiseArgs& args, unsigned char* workspace, void* stream) {
    if (args.num_poses == 0) return;
    const bool few = joint_pairs(program.num_joints) == 8;
    if (program.bfloat16) {
        (few ? denoise<Bfloat16, 8> : denoise<Bfloat16, 9>)(program, args, workspace, stream);
    } else {
        (few ? denoise<float, 8> : denoise<float, 9>)(program, args, workspace, stream);
    }
}

void launch_sample_layers(const CudaProgram& program, const CudaSampleArgs& args, unsigned char* workspace,
                          void* stream) {
    if (args.num_frames * args.num_hypotheses == 0) return;
    const bool few = joint_pairs(program.num_joints) == 8;
    if (program.bfloat16) {
        (few ? sample_layers<Bfloat16, 8> : sample_layers<Bfloat16, 9>)(program, args, workspace, stream);
    } else {
        (few ? sample_layers<float, 8> : sample_layers<float, 9>)(program, args, workspace, stream);
    }
}

void launch_sample_persistent(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream) {
    if (args.num_frames * args.num_hypotheses == 0) return;
    (joint_pairs(program.num_joints) == 8 ? sample_persistent<8> : sample_persistent<9>)(program, args, num_blocks,
                                                                                         stream);
}

}  // namespace diffupose
