#include "common/cuda.h"
#include "engine/cuda_layers.cuh"
#include "engine/cuda_steps.cuh"
#include "engine/engine_cuda.h"

namespace diffupose {
namespace {

// Warps that share the channels of one product in the kernels of single layers.
constexpr int kSplit = 4;
constexpr int kSplitThreads = kSplit * kWarpSize;
// Warps of a block of the persistent kernel: with two a scheduler, one multiplies while the other mixes joints, and
// each may hold 255 registers.
constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = kPersistentWarps * kWarpSize;

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
    fill_input<T, PairLayout>(shape, workspace + blockIdx.x * tile_bytes, x, condition,
                              int64_t{kTilePoses} * blockIdx.x, num_poses, poses_per_condition, 2 * pairs,
                              static_cast<int>(threadIdx.x), kSplitThreads);
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
    reverse_step<PairLayout>(shape, args, memory, first_pose, step, static_cast<int>(threadIdx.x), kSplitThreads);
    if (step + 1 == args.num_steps) return;
    __syncthreads();
    fill_input<T, PairLayout>(shape, memory, args.out, args.condition, first_pose,
                              args.num_frames * args.num_hypotheses, args.num_hypotheses, 2 * pairs,
                              static_cast<int>(threadIdx.x), kSplitThreads);
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
            fill_input<Bfloat16, PairLayout>(shape, memory, args.out, args.condition, int64_t{kTilePoses} * tile,
                                             args.num_frames * args.num_hypotheses, args.num_hypotheses, 2 * kPairs,
                                             static_cast<int>(threadIdx.x), kPersistentThreads);
            for (int i = 0; i < num_layers; ++i) {
                __syncthreads();
                run_layer<kPairs>(layers[i], memory, shape.joints, args.parameters + step * args.num_parameters);
            }
            __syncthreads();
            reverse_step<PairLayout>(shape, args, memory, int64_t{kTilePoses} * tile, step,
                                     static_cast<int>(threadIdx.x), kPersistentThreads);
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
