#include <algorithm>

#include "philox_normal/philox.h"
#include "philox_normal/philox_normal.h"

namespace diffupose {
namespace {

// With less work, waking a second thread (microseconds) costs more than it saves (about 10 ns an element).
constexpr int64_t kMinElementsPerThread = 4096;

}  // namespace

void philox_normal_row(PhiloxKey key, uint64_t frame_id, uint32_t hypothesis_id, uint32_t step, int64_t num_elements,
                       float* out) {
    const int64_t num_full = num_elements / 4;
    for (int64_t block = 0; block < num_full; ++block) {
        philox_normal_block(key, frame_id, hypothesis_id, step, static_cast<uint32_t>(block), out + 4 * block);
    }
    if (num_elements % 4 != 0) {
        float tail[4];
        philox_normal_block(key, frame_id, hypothesis_id, step, static_cast<uint32_t>(num_full), tail);
        std::copy_n(tail, num_elements % 4, out + 4 * num_full);
    }
}

void launch_philox_normal(uint64_t seed, const int64_t* frame_ids, const int64_t* hypothesis_ids, uint32_t step,
                          float* out, PhiloxNormalSizes sizes, int num_threads) {
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    const int64_t num_rows = sizes.num_frames * sizes.num_hypotheses;
    const int64_t useful_threads = std::max<int64_t>(1, num_rows * sizes.num_elements / kMinElementsPerThread);
    num_threads = static_cast<int>(std::min<int64_t>(num_threads, useful_threads));
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < num_rows; ++row) {
        philox_normal_row(key, static_cast<uint64_t>(frame_ids[row / sizes.num_hypotheses]),
                          static_cast<uint32_t>(hypothesis_ids[row % sizes.num_hypotheses]), step, sizes.num_elements,
                          out + row * sizes.num_elements);
    }
}

}  // namespace diffupose
