// The persistent kernel of engine_cuda.h by `mma`. It stays for what no other kernel serves: many hypotheses of 18
// joints, and of any number of joints on GPUs other than Hopper's.
#include "common/cuda.h"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/pair_tasks.cuh"
#include "engine/cuda/persistent/mma_product.cuh"
#include "engine/cuda/steps.cuh"

namespace diffupose {
namespace {

// Two warps for each scheduler: one multiplies while the other mixes joints, and each thread may hold 255 registers.
constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = kPersistentWarps * kWarpSize;

// Each kind of layer has its own loop. One loop that branches for each task makes the kernel spill more.
template <int kPairs>
__device__ void run_layer(const LayerRecord& layer, unsigned char* memory, int joints, const float* parameters) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const Lane lane = this_lane();
    if (layer.kind == LayerKind::graph_conv) {
        for (int i = warp; i < layer.output_blocks; i += kPersistentWarps) {
            product_task<kPairs, 2, 2>(layer, memory, parameters, 2 * i, lane);
        }
    } else if (layer.kind == LayerKind::linear) {
        for (int i = warp; i < layer.output_blocks; i += kPersistentWarps) {
            product_task<kPairs, 1, 2>(layer, memory, parameters, 2 * i, lane);
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
        for (int i = warp; i < layer.output_blocks; i += kPersistentWarps) {
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

void launch_sample_persistent(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream) {
    if (args.num_frames * args.num_hypotheses == 0) return;
    (joint_pairs(program.num_joints) == 8 ? sample_persistent<8> : sample_persistent<9>)(program, args, num_blocks,
                                                                                         stream);
}

}  // namespace diffupose
