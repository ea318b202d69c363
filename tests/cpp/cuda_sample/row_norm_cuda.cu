#include "common/cuda.h"
#include "cuda_sample/sample_cuda.h"

namespace diffupose {
namespace {

constexpr int kRowThreads = 96, kWarps = kRowThreads / 32, kNormBlocks = 2;

__global__ void __launch_bounds__(kRowThreads)
    row_norm_kernel(const float* __restrict__ x, float* __restrict__ out, int rows, int columns) {
    DIFFUPOSE_DYNAMIC_SHARED(shared);
    float* const partial = reinterpret_cast<float*>(shared);  // one of each warp
    float* const row_in_shared = partial + kWarps;            // its values, each read by the thread's neighbour
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
        float sum = 0.0f;
        for (int i = thread; i < columns; i += kRowThreads) sum += x[row * columns + i] * x[row * columns + i];
        for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
        if (lane == 0) partial[thread / 32] = sum;
        __syncthreads();
        float total = 0.0f;
        for (int i = 0; i < kWarps; ++i) total += partial[i];
        const float scale = 1.0f / std::sqrt(total);
        // Through the neighbour of the same warp, to have need of a barrier of the warp.
        for (int first = 0; first < columns; first += kRowThreads) {
            row_in_shared[thread] = first + thread < columns ? x[row * columns + first + thread] * scale : 0.0f;
            __syncwarp();
            const int partner = thread ^ 1;
            if (first + partner < columns) out[row * columns + first + partner] = row_in_shared[partner];
            __syncwarp();
        }
        // The next row's sums may not come before all have read this one's.
        __syncthreads();
    }
}

}  // namespace

void launch_row_norm_cuda(const float* x, float* out, int rows, int columns, void* stream) {
    const int bytes = static_cast<int>(sizeof(float)) * (kWarps + kRowThreads);
    DIFFUPOSE_LAUNCH(row_norm_kernel, kNormBlocks, kRowThreads, bytes, stream, x, out, rows, columns);
    check_launch("row_norm");
}

}  // namespace diffupose
