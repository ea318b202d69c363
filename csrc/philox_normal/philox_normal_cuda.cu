#include "common/cuda.h"
#include "common/cuda_grid.h"
#include "philox_normal/philox_cuda.cuh"
#include "philox_normal/philox_normal_cuda.h"

namespace diffupose {
namespace {

// A thread for each counter, that is for four elements. Index counts them; dividing 64-bit numbers takes many
// instructions.
template <typename Index>
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(PhiloxKey key, const int64_t* __restrict__ frame_ids,
                         const int64_t* __restrict__ hypothesis_ids, uint32_t step, float* __restrict__ out,
                         PhiloxNormalSizes sizes) {
    const int64_t per_row = (sizes.num_elements + 3) / 4;
    const int64_t total = sizes.num_frames * sizes.num_hypotheses * per_row;
    const auto blocks = static_cast<Index>(per_row), hypotheses = static_cast<Index>(sizes.num_hypotheses);
    for (int64_t i = first_index(); i < total; i += index_stride()) {
        const Index row = static_cast<Index>(i) / blocks, block = static_cast<Index>(i) - row * blocks;
        const Index frame = row / hypotheses;
        float z[4];
        philox_normal_block_cuda(key, static_cast<uint64_t>(frame_ids[frame]),
                                 static_cast<uint32_t>(hypothesis_ids[row - frame * hypotheses]), step,
                                 static_cast<uint32_t>(block), z);
        const int64_t element = int64_t{4} * block;
        float* to = out + static_cast<int64_t>(row) * sizes.num_elements + element;
        for (int k = 0; k < 4; ++k) {
            if (element + k < sizes.num_elements) to[k] = z[k];
        }
    }
}

}  // namespace

void launch_philox_normal_cuda(uint64_t seed, const int64_t* frame_ids, const int64_t* hypothesis_ids, uint32_t step,
                               float* out, PhiloxNormalSizes sizes, void* stream) {
    const int64_t total = sizes.num_frames * sizes.num_hypotheses * ((sizes.num_elements + 3) / 4);
    if (total == 0) return;
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    const auto kernel = total < int64_t{1} << 32 ? philox_normal_kernel<uint32_t> : philox_normal_kernel<uint64_t>;
    DIFFUPOSE_LAUNCH(kernel, grid_for(total), kThreads, 0, stream, key, frame_ids, hypothesis_ids, step, out, sizes);
    check_launch("philox_normal");
}

}  // namespace diffupose
