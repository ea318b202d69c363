#include "common/cuda.h"
#include "cuda_faults/faults_cuda.h"

namespace diffupose {
namespace {

constexpr int kCount = 64;
constexpr unsigned kAll = 0xffffffffu, kHalf = 0x0000ffffu;

__global__ void __launch_bounds__(kCount)
    faults_kernel(Fault fault, const float* __restrict__ in, float* __restrict__ out) {
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const bool within = fault == Fault::missing_warp_barrier || fault == Fault::shuffle_orders;
    const int partner = within ? thread ^ 31 : kCount - 1 - thread;
    if (fault == Fault::early_return && thread == 40) return;
    if (fault != Fault::unwritten_shared || thread != 5) shared[thread] = in[thread];
    if (fault == Fault::shared_overrun && thread == 0) shared[kCount] = 1.0f;
    float zero = 0.0f;
    switch (fault) {
        case Fault::missing_barrier:
            __syncwarp();
            break;
        case Fault::missing_warp_barrier:
            break;
        case Fault::shuffle_orders:
            zero = 0.0f * __shfl_sync(kAll, static_cast<float>(lane), 0);
            break;
        case Fault::divergent_barrier:
            if (thread < 32) __syncthreads();
            break;
        case Fault::divergent_warp:
            __syncthreads();
            if (lane < 16) __syncwarp();
            break;
        case Fault::unmet_arrival:
            __syncthreads();
            if (thread < 32) emulation::arrive_at_barrier(1, kCount);
            break;
        case Fault::absent_lane:
            __syncthreads();
            if (lane < 16) zero = 0.0f * __shfl_sync(kHalf, 1.0f, 20);
            break;
        default:
            __syncthreads();
            break;
    }
    if (fault == Fault::misaligned && thread == 0) {
        const float4 four = *reinterpret_cast<const float4*>(shared + 1);
        zero = 0.0f * four.x;
    }
    out[partner + (fault == Fault::global_overrun && thread == 0 ? 1 : 0)] = shared[partner] + zero;
}

__global__ void __launch_bounds__(kCount)
    early_kernel(Fault fault, const float* __restrict__ in, float* __restrict__ out) {
    const int thread = static_cast<int>(threadIdx.x);
    let_next_kernel_start();
    if (fault != Fault::never_waits || thread != 3) wait_for_earlier_kernels();
    out[thread] = in[thread];
}

// Block 0 writes, block 1 adds to what it finds.
__global__ void __launch_bounds__(kCount) block_order_kernel(const float* __restrict__ in, float* __restrict__ out) {
    const int thread = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0) out[thread] = in[thread] + 1.0f;
    if (blockIdx.x == 1) out[thread] -= 1.0f;
}

}  // namespace

void launch_faults_cuda(Fault fault, const float* in, float* out, void* stream) {
    if (fault == Fault::none || fault == Fault::never_waits) {
        DIFFUPOSE_LAUNCH_EARLY(early_kernel, 1, kCount, 0, stream, waits(early_kernel), fault, in, out);
        if (fault == Fault::never_waits) return;
    }
    if (fault == Fault::block_order) {
        DIFFUPOSE_LAUNCH(block_order_kernel, 2, kCount, 0, stream, in, out);
    } else {
        DIFFUPOSE_LAUNCH(faults_kernel, 1, kCount, static_cast<int>(sizeof(float)) * kCount, stream, fault, in, out);
    }
    check_launch("faults");
}

}  // namespace diffupose
