// The persistent kernel of engine_cuda.h for Hopper: one block a multiprocessor, two warpgroups.
#include "common/cuda.h"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/persistent/wgmma_others.cuh"
#include "engine/cuda/steps.cuh"

namespace diffupose {
namespace {

template <int kJoints>
__global__ void __launch_bounds__(kBlockThreads, 1)
    wgmma_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args,
                 const LayerRecord* layers, int num_layers, unsigned num_tiles, int staging) {
#if !defined(__CUDA_ARCH__) || defined(DIFFUPOSE_WGMMA)
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    unsigned turn = 0;  // group turn % 2 multiplies
    if (this_place().group == 1) arrive_at_barrier(kTurnBarrier);
    for (unsigned tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const int64_t first_pose = int64_t{kTilePoses} * tile;
        draw_initial(shape, args, first_pose, static_cast<int>(threadIdx.x), kBlockThreads);
        for (int step = 0; step < args.num_steps; ++step) {
            const Parameters parameters = {args, step};
            __syncthreads();
            fill_input<Bfloat16, WgmmaLayout>(shape, memory, args.out, args.condition, first_pose,
                                              args.num_frames * args.num_hypotheses, args.num_hypotheses, kJoints,
                                              static_cast<int>(threadIdx.x), kBlockThreads);
            publish_to_products();
            __syncthreads();
            bool product_before = false;
#pragma unroll 1
            for (int i = 0; i < num_layers; ++i) {
                const LayerRecord& layer = layers[i];
                const bool product_behind = is_product(layer) && i + 1 < num_layers && is_product(layers[i + 1]);
                if (layer.kind == LayerKind::graph_conv) {
                    product_layer<kJoints, 2>(layer, memory, memory + staging, parameters, turn, product_before,
                                              product_behind);
                } else if (layer.kind == LayerKind::linear) {
                    product_layer<kJoints, 1>(layer, memory, memory + staging, parameters, turn, product_before,
                                              product_behind);
                } else {
                    other_layer<kJoints>(layer, memory, shape.joints, parameters);
                    publish_to_products();
                }
                turn += static_cast<unsigned>(turns_of(layer));
                product_before = product_behind;
                if (!product_behind) __syncthreads();
            }
            reverse_step<WgmmaLayout>(shape, args, memory, first_pose, step, static_cast<int>(threadIdx.x),
                                      kBlockThreads);
        }
    }
    // Completes the barrier of the turn that no block took.
    if (static_cast<int>(turn % 2) == this_place().group) sync_barrier(kTurnBarrier + this_place().group);
#endif
}

template <int kJoints>
void sample_wgmma(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream) {
    const auto kernel = wgmma_kernel<kJoints>;
    const int64_t tiles = num_tiles(args.num_frames * args.num_hypotheses);
    allow_shared_bytes(kernel, static_cast<int>(program.tile_bytes));
    const auto grid = static_cast<unsigned>(tiles < num_blocks ? tiles : num_blocks);
    DIFFUPOSE_LAUNCH(kernel, grid, kBlockThreads, static_cast<int>(program.tile_bytes), stream, shape_of(program), args,
                     program.layers_cuda, program.num_layers, static_cast<unsigned>(tiles),
                     static_cast<int>(program.tile_bytes) - kWgmmaStagingBytes);
    check_launch("wgmma_kernel");
}

}  // namespace

bool wgmma_available() {
#ifndef __CUDACC__
    return true;
#elif defined(DIFFUPOSE_HAS_SM90A)
    int device = 0, major = 0, minor = 0;
    check_cuda(cudaGetDevice(&device), "the current device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "a device's attribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "a device's attribute");
    return major == 9 && minor == 0;
#else
    return false;
#endif
}

void launch_sample_wgmma(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream) {
    if (args.num_frames * args.num_hypotheses == 0) return;
    (wgmma_joints(program.num_joints) == 16 ? sample_wgmma<16> : sample_wgmma<17>)(program, args, num_blocks, stream);
}

}  // namespace diffupose
