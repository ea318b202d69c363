#include "common/cuda.h"
#include "common/cuda_grid.h"
#include "common/cuda_philox.h"
#include "philox_normal/philox_normal_cuda.h"

namespace diffupose {
namespace {

// One thread for each counter, that is for four elements.
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(PhiloxKey key, const int64_t* __restrict__ frame_ids,
                         const int64_t* __restrict__ hypothesis_ids, uint32_t step, float* __restrict__ out,
                         PhiloxNormalSizes sizes) {
    const int64_t blocks = (sizes.num_elements + 3) / 4;
    const int64_t total = sizes.num_frames * sizes.num_hypotheses * blocks;
    for (int64_t i = first_index(); i < total; i += index_stride()) {
        const int64_t row = i / blocks, block = i % blocks;
        float z[4];
        philox_normal_block_cuda(key, static_cast<uint64_t>(frame_ids[row / sizes.num_hypotheses]),
                                 static_cast<uint32_t>(hypothesis_ids[row % sizes.num_hypotheses]), step,
                                 static_cast<uint32_t>(block), z);
        float* to = out + row * sizes.num_elements + 4 * block;
        for (int k = 0; k < 4; ++k) {
            if (4 * block + k < sizes.num_elements) to[k] = z[k];
        }
    }
}

}  // namespace

void launch_philox_normal_cuda(uint64_t seed, const int64_t* frame_ids, const int64_t* hypothesis_ids, uint32_t step,
                               float* out, PhiloxNormalSizes sizes, void* stream) {
    const int64_t total = sizes.num_frames * sizes.num_hypotheses * ((sizes.num_elements + 3) / 4);
    if (total == 0) return;
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    DIFFUPOSE_LAUNCH(philox_normal_kernel, grid_for(total), kThreads, 0, stream, key, frame_ids, hypothesis_ids, step,
                     out, sizes);
    check_launch("philox_normal");
}

}  // namespace diffupose
