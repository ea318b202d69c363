#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "philox_normal/philox_normal.h"
#include "reverse_step/reverse_step.h"
#include "reverse_step/reverse_step_row.h"

namespace diffupose {
namespace {

// With less work, waking a second thread (microseconds) costs more than it saves. Drawing noise takes about ten times
// as long as the rest.
constexpr int64_t kMinElementsPerThread = 1 << 15, kMinDrawnPerThread = 1 << 12;

}  // namespace

void launch_reverse_step(const float* row, float clip, const float* sample, const float* model_output,
                         const float* x0_last, const StepNoise& noise, const float* noise_scale, float* prev_sample,
                         float* x0, ReverseStepSizes sizes, int num_threads) {
    const PhiloxKey key = {static_cast<uint32_t>(noise.seed), static_cast<uint32_t>(noise.seed >> 32)};
    const bool reads_last = row[4] != 0.0f, draws = row[5] != 0.0f && noise.given == nullptr;
    const int64_t num_poses = sizes.num_frames * sizes.num_hypotheses, numel = 3 * sizes.num_joints;
    const int64_t per_thread = draws ? kMinDrawnPerThread : kMinElementsPerThread;
    const int64_t useful = std::max<int64_t>(1, num_poses * numel / per_thread);
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, useful));
    std::vector<float> drawn(static_cast<std::size_t>(draws ? threads * numel : 0));  // one pose a thread
    parallel(threads, [&](int index, int count) {
        float* z = drawn.data() + (draws ? index * numel : 0);
        for (int64_t pose = num_poses * index / count; pose < num_poses * (index + 1) / count; ++pose) {
            const int64_t offset = pose * numel;
            if (draws) {
                philox_normal_row(key, static_cast<uint64_t>(noise.frame_ids[pose / sizes.num_hypotheses]),
                                  static_cast<uint32_t>(noise.hypothesis_ids[pose % sizes.num_hypotheses]), noise.step,
                                  numel, z);
            }
            std::copy_n(sample + offset, numel, prev_sample + offset);
            if (reads_last) std::copy_n(x0_last + offset, numel, x0 + offset);
            reverse_step_row(row, clip, sizes.num_joints, model_output + pose * sizes.num_joints * sizes.output_stride,
                             sizes.output_stride, draws ? z : noise.given + (noise.given == nullptr ? 0 : offset),
                             noise_scale, prev_sample + offset, x0 + offset);
        }
    });
}

}  // namespace diffupose
