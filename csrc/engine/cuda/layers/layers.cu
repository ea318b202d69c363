#include "common/cuda.h"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/layers/split.cuh"
#include "engine/cuda/pair_tasks.cuh"
#include "engine/cuda/steps.cuh"

namespace diffupose {
namespace {

// Threads of the kernels that are no products.
constexpr int kSideWarps = 4;
constexpr int kSideThreads = kSideWarps * kWarpSize;
// A product's block takes 8 columns while each block can have a multiprocessor to itself. With more blocks it takes 16
// columns, which halves the reads of activations.
constexpr int64_t kFewBlocks = 128;
template <typename T, int kPairs, int kProducts, int kBlocks>
__global__ void __launch_bounds__(kPairs* kWarpSize, sizeof(T) == 2 ? 2 : 1)
    product_kernel(const __grid_constant__ LayerRecord layer, unsigned char* workspace, int64_t tile_bytes,
                   Tiling tiling, const float* parameters) {
    let_next_kernel_start();
    __shared__ SplitLayer<T, kPairs, kProducts, kBlocks> shared;
    shared.run(layer, workspace + blockIdx.x * tile_bytes, parameters, static_cast<int>(blockIdx.y) * kBlocks,
               tiling.count(blockIdx.x), static_cast<int>(threadIdx.x) / kWarpSize, this_lane());
}

// How many tasks a layer has, for a warp each.
template <int kPairs>
__host__ __device__ inline int tasks_of(const LayerRecord& layer) {
    return layer.kind == LayerKind::scale_shift         ? kPairs
           : layer.kind == LayerKind::attention_weights ? layer.num_heads * kPairs
                                                        : layer.output_blocks;
}

template <typename T, int kPairs>
__device__ inline void run_task(const LayerRecord& layer, unsigned char* memory, int joints, const float* parameters,
                                int task) {
    if (layer.kind == LayerKind::scale_shift) {
        scale_shift_task<T>(layer, memory, parameters, task, this_lane());
    } else if (layer.kind == LayerKind::attention_weights) {
        attention_weights_task<T, kPairs>(layer, memory, joints, task / kPairs, task % kPairs, this_lane());
    } else {
        attention_apply_task<T, kPairs>(layer, memory, task, this_lane());
    }
}

// A block runs kSideWarps tasks.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kSideThreads)
    task_kernel(const __grid_constant__ LayerRecord layer, unsigned char* workspace, int64_t tile_bytes, int joints,
                const float* parameters) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int task = static_cast<int>(blockIdx.y) * kSideWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    if (task >= tasks_of<kPairs>(layer)) return;
    run_task<T, kPairs>(layer, workspace + blockIdx.x * tile_bytes, joints, parameters, task);
}

template <typename T>
__global__ void __launch_bounds__(kSideThreads)
    fill_kernel(const __grid_constant__ Shape shape, unsigned char* workspace, int64_t tile_bytes, Tiling tiling,
                const float* x, const float* condition, int64_t poses_per_condition, int pairs) {
    const int64_t first_pose = tiling.first(blockIdx.x);
    fill_input<T, PairLayout>(shape, workspace + blockIdx.x * tile_bytes, x, condition, first_pose,
                              first_pose + tiling.count(blockIdx.x), poses_per_condition, 2 * pairs,
                              static_cast<int>(threadIdx.x), kSideThreads);
}

__global__ void __launch_bounds__(kSideThreads)
    draw_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args) {
    draw_initial(shape, args, int64_t{kTilePoses} * blockIdx.x, static_cast<int>(threadIdx.x), kSideThreads);
}

// The condition's part of a record of the input buffer; the rest of the record is 0. `record` is the index in memory.
__device__ inline void load_condition(const Shape& shape, const CudaSampleArgs& args, int64_t first_pose, int poses,
                                      int record, float* values) {
    const int pose = record % kWarpSize / 4, channel_block = record / kWarpSize % shape.input_blocks;
    const int pair = record / kWarpSize / shape.input_blocks;
    const int64_t row = (first_pose + pose) / args.num_hypotheses * shape.joints + 2 * pair;
#pragma unroll
    for (int i = 0; i < kRecord; ++i) {
        const int channel = channel_block * kChannelBlock + record % 4 * 2 + i / 4 * 8 + i % 2 - 3, which = i / 2 % 2;
        const bool inside =
            pose < poses && 2 * pair + which < shape.joints && channel >= 0 && channel < shape.condition_channels;
        values[i] = inside ? __ldcg(args.condition + (row + which) * shape.condition_channels + channel) : 0.0f;
    }
}

// Stores a record of the input buffer: the condition, and x_t of the poses, which are `stride` apart.
template <typename T>
__device__ inline void store_input(const Shape& shape, unsigned char* memory, const float* x, int stride, int poses,
                                   int record, float* values) {
    const int pose = record % kWarpSize / 4, first = record % 4 * 2, pair = record / kWarpSize / shape.input_blocks;
    const bool has_x = record / kWarpSize % shape.input_blocks == 0 && pose < poses;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of the record's lower channels
        const int joint = 2 * pair + i / 2, channel = first + i % 2;
        if (has_x && channel < 3 && joint < shape.joints) values[i] = x[pose * stride + joint * 3 + channel];
    }
    store8(at<T>(memory, shape.input) + record * kRecord, values);
}

// The end of a step, and the input buffer of the next one.
template <typename T, int kPairs>
struct StepEnd {
    static constexpr int kThreads = kPairs * kWarpSize, kElements = 3 * 2 * kPairs;
    static_assert(kTilePoses * ((kElements + 3) / 4) <= kThreads);  // each thread draws four numbers
    // A warp takes a pose; each of its lanes takes kRounds numbers.
    static constexpr int kRounds = (kElements + kWarpSize - 1) / kWarpSize;
    static_assert(kTilePoses <= kPairs);
    float noise[kPairs][kRounds * kWarpSize], next[kPairs][kRounds * kWarpSize];

    // A block runs it for its pose tile.
    __device__ void run(const Shape& shape, const CudaSampleArgs& args, unsigned char* memory, Tiling tiling,
                        int step) {
        const int thread = static_cast<int>(threadIdx.x), elements = 3 * shape.joints;
        const int64_t first_pose = tiling.first(blockIdx.x);
        const int poses = tiling.count(blockIdx.x), records = kPairs * shape.input_blocks * kWarpSize;
        const bool is_last = step + 1 == args.num_steps;
        const StepRow row = step_row(args, step);
        float record[kRecord] = {};
        if (!is_last) load_condition(shape, args, first_pose, poses, thread, record);
        const int blocks = (elements + 3) / 4, in_tile = thread / blocks, block = thread % blocks;
        if (in_tile < poses && row.s != 0.0f) {
            float z[4];
            draw(args, key_of(args.seed), first_pose + in_tile, static_cast<uint32_t>(step), block, z);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int element = 4 * block + i;
                if (element >= elements) continue;
                noise[in_tile][element] = noise_scale(args, step, elements, element) * z[i];
            }
        }
        const int warp = thread / kWarpSize;
        float* const out = args.out + (first_pose + warp) * elements;
        float* const last = args.x0_last == nullptr ? nullptr : args.x0_last + (first_pose + warp) * elements;
        const float* const output = at<const float>(memory, shape.output);
        __syncthreads();
        wait_for_earlier_kernels();

        float x[kRounds], said[kRounds], x0_last[kRounds];
#pragma unroll
        for (int k = 0; k < kRounds; ++k) {
            const int element = thread % kWarpSize + k * kWarpSize;
            const bool there = warp < poses && element < elements;
            x[k] = load_if(out + element, there);
            said[k] = load_if(output + element_index(element / 3, warp, element % 3, shape.output_blocks), there);
            x0_last[k] = load_if((row.c_1 != 0.0f ? last : out) + element, there && row.c_1 != 0.0f);
        }
#pragma unroll
        for (int k = 0; k < kRounds; ++k) {
            const int element = thread % kWarpSize + k * kWarpSize;
            const float x0 = predicted_x0(row, args.clip, x[k], said[k]);
            const float previous =
                previous_sample(row, x[k], x0, x0_last[k], row.s != 0.0f ? noise[warp][element] : 0.0f);
            next[warp][element] = previous;
            if (warp >= poses || element >= elements) continue;
            out[element] = previous;
            if (last != nullptr) last[element] = x0;
        }
        if (is_last) return;
        __syncthreads();
        if (thread < records) store_input<T>(shape, memory, next[0], kRounds * kWarpSize, poses, thread, record);
        for (int i = thread + kThreads; i < records; i += kThreads) {
            load_condition(shape, args, first_pose, poses, i, record);
            store_input<T>(shape, memory, next[0], kRounds * kWarpSize, poses, i, record);
        }
    }
};

template <typename T, int kPairs>
__global__ void __launch_bounds__(kPairs* kWarpSize)
    step_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args,
                unsigned char* workspace, int64_t tile_bytes, Tiling tiling, int step) {
    let_next_kernel_start();
    __shared__ StepEnd<T, kPairs> shared;
    shared.run(shape, args, workspace + blockIdx.x * tile_bytes, tiling, step);
}

__global__ void __launch_bounds__(kSideThreads)
    output_kernel(Shape shape, unsigned char* workspace, int64_t tile_bytes, Tiling tiling, float* out) {
    const float* output = at<const float>(workspace + blockIdx.x * tile_bytes, shape.output);
    const int row = shape.joints * shape.output_channels;
    for (int i = static_cast<int>(threadIdx.x); i < tiling.count(blockIdx.x) * row; i += kSideThreads) {
        const int joint = i % row / shape.output_channels, channel = i % shape.output_channels;
        out[tiling.first(blockIdx.x) * row + i] = output[element_index(joint, i / row, channel, shape.output_blocks)];
    }
}

Tiling tiling_of(int64_t poses) {
    const int64_t tiles = num_tiles(poses);
    return {poses, static_cast<int>((poses + tiles - 1) / tiles)};
}

// Arguments of every layer's launch.
struct Launch {
    unsigned char* workspace;
    Tiling tiling;
    void* stream;
    bool early;
};

template <typename T, int kPairs, int kProducts>
void launch_product(const LayerRecord& layer, const CudaProgram& program, const Launch& to, const float* parameters) {
    const int64_t tiles = num_tiles(to.tiling.poses);
    const auto grid = static_cast<unsigned>(tiles), blocks = static_cast<unsigned>(layer.output_blocks);
    if (tiles * 2 * layer.output_blocks > kFewBlocks) {
        const auto wide = product_kernel<T, kPairs, kProducts, 2>;
        DIFFUPOSE_LAUNCH_EARLY(wide, dim3(grid, blocks), kPairs * kWarpSize, 0, to.stream, to.early, layer,
                               to.workspace, program.tile_bytes, to.tiling, parameters);
        return;
    }
    const auto kernel = product_kernel<T, kPairs, kProducts, 1>;
    DIFFUPOSE_LAUNCH_EARLY(kernel, dim3(grid, 2 * blocks), kPairs * kWarpSize, 0, to.stream, to.early, layer,
                           to.workspace, program.tile_bytes, to.tiling, parameters);
}

template <typename T, int kPairs>
void launch_layers(const CudaProgram& program, const Launch& to, const float* parameters) {
    const auto grid = static_cast<unsigned>(num_tiles(to.tiling.poses));
    for (int i = 0; i < program.num_layers; ++i) {
        const LayerRecord& layer = program.layers[i];
        if (layer.kind == LayerKind::graph_conv) {
            launch_product<T, kPairs, 2>(layer, program, to, parameters);
        } else if (layer.kind == LayerKind::linear) {
            launch_product<T, kPairs, 1>(layer, program, to, parameters);
        } else {
            const int tasks = tasks_of<kPairs>(layer);
            const auto kernel = task_kernel<T, kPairs>;
            DIFFUPOSE_LAUNCH_EARLY(kernel, dim3(grid, static_cast<unsigned>((tasks + kSideWarps - 1) / kSideWarps)),
                                   kSideThreads, 0, to.stream, to.early, layer, to.workspace, program.tile_bytes,
                                   program.num_joints, parameters);
        }
        check_launch("a layer");
    }
}

template <typename T, int kPairs>
void denoise(const CudaProgram& program, const CudaDenoiseArgs& args, unsigned char* workspace, void* stream) {
    const Shape shape = shape_of(program);
    const auto grid = static_cast<unsigned>(num_tiles(args.num_poses));
    const Launch to = {workspace, tiling_of(args.num_poses), stream, waits(product_kernel<T, kPairs, 1, 1>)};
    const auto fill = fill_kernel<T>;
    DIFFUPOSE_LAUNCH(fill, grid, kSideThreads, 0, stream, shape, workspace, program.tile_bytes, to.tiling, args.sample,
                     args.condition, int64_t{1}, kPairs);
    check_launch("fill_kernel");
    launch_layers<T, kPairs>(program, to, args.parameters);
    DIFFUPOSE_LAUNCH(output_kernel, grid, kSideThreads, 0, stream, shape, workspace, program.tile_bytes, to.tiling,
                     args.out);
    check_launch("output_kernel");
}

template <typename T, int kPairs>
void sample_layers(const CudaProgram& program, const CudaSampleArgs& args, unsigned char* workspace, void* stream) {
    const Shape shape = shape_of(program);
    const int64_t poses = args.num_frames * args.num_hypotheses;
    const auto grid = static_cast<unsigned>(num_tiles(poses));
    const auto end = step_kernel<T, kPairs>;
    const Launch to = {workspace, tiling_of(poses), stream, waits(end)};
    DIFFUPOSE_LAUNCH(draw_kernel, grid, kSideThreads, 0, stream, shape, args);
    check_launch("draw_kernel");
    const auto fill = fill_kernel<T>;
    DIFFUPOSE_LAUNCH(fill, grid, kSideThreads, 0, stream, shape, workspace, program.tile_bytes, to.tiling, args.out,
                     args.condition, args.num_hypotheses, kPairs);
    check_launch("fill_kernel");
    for (int step = 0; step < args.num_steps; ++step) {
        launch_layers<T, kPairs>(program, to, args.parameters + step * args.num_parameters);
        DIFFUPOSE_LAUNCH_EARLY(end, grid, kPairs * kWarpSize, 0, stream, to.early, shape, args, workspace,
                               program.tile_bytes, to.tiling, step);
        check_launch("step_kernel");
    }
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

}  // namespace diffupose
