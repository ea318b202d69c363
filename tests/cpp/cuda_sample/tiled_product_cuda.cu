#include "common/cuda.h"
#include "cuda_sample/sample_cuda.h"

namespace diffupose {
namespace {

constexpr int kTile = 8;

__global__ void __launch_bounds__(kTile* kTile)
    tiled_product_kernel(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out, int rows,
                         int inner, int columns) {
    __shared__ float a_tile[kTile][kTile], b_tile[kTile][kTile];
    const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
    const int row = static_cast<int>(blockIdx.y) * kTile + y, column = static_cast<int>(blockIdx.x) * kTile + x;
    float sum = 0.0f;
    for (int first = 0; first < inner; first += kTile) {
        a_tile[y][x] = row < rows && first + x < inner ? a[row * inner + first + x] : 0.0f;
        b_tile[y][x] = first + y < inner && column < columns ? b[(first + y) * columns + column] : 0.0f;
        __syncthreads();
        for (int i = 0; i < kTile; ++i) sum += a_tile[y][i] * b_tile[i][x];
        __syncthreads();
    }
    if (row < rows && column < columns) out[row * columns + column] = sum;
}

}  // namespace

void launch_tiled_product_cuda(const float* a, const float* b, float* out, int rows, int inner, int columns,
                               void* stream) {
    const dim3 grid(static_cast<unsigned>((columns + kTile - 1) / kTile),
                    static_cast<unsigned>((rows + kTile - 1) / kTile));
    DIFFUPOSE_LAUNCH(tiled_product_kernel, grid, dim3(kTile, kTile), 0, stream, a, b, out, rows, inner, columns);
    check_launch("tiled_product");
}

}  // namespace diffupose
