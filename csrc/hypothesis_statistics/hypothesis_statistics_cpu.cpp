#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "hypothesis_statistics/hypothesis_statistics.h"
#include "hypothesis_statistics/seen_frame.h"

namespace diffupose {
namespace {

// Below this a second thread costs more (microseconds to wake it) than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 14;

// Mean and covariance of one frame. The hypotheses are read twice, the second time from the cache: sums of differences
// from the mean do not cancel where the mean is far from 0.
void moments(const float* x, int64_t count, int64_t joints, float* mean, float* covariance, float* scratch) {
    const int64_t numel = 3 * joints;
    // Averaging differences makes the mean of equal hypotheses exactly that pose, and their covariance exactly zero.
    std::fill_n(mean, numel, 0.0f);
    for (int64_t h = 1; h < count; ++h) {
        for (int64_t i = 0; i < numel; ++i) mean[i] += x[h * numel + i] - x[i];
    }
    for (int64_t i = 0; i < numel; ++i) mean[i] = x[i] + mean[i] / static_cast<float>(count);
    if (count < kMinHypotheses) {
        std::fill_n(covariance, 3 * numel, kNan);
        return;
    }
    // Products of each number with itself, the next and the one after that: of every three numbers, the six products of
    // a covariance. The last joint also multiplies numbers behind the pose; these products are not used.
    float *centered = scratch, *own = centered + numel + 2, *next = own + numel, *second = next + numel;
    std::fill_n(scratch, 4 * numel + 2, 0.0f);
    for (int64_t h = 0; h < count; ++h) {
        for (int64_t i = 0; i < numel; ++i) centered[i] = x[h * numel + i] - mean[i];
        for (int64_t i = 0; i < numel; ++i) {
            own[i] += centered[i] * centered[i];
            next[i] += centered[i] * centered[i + 1];
            second[i] += centered[i] * centered[i + 2];
        }
    }
    const float divisor = static_cast<float>(count - 1);
    for (int64_t j = 0; j < joints; ++j) {
        const int64_t i = 3 * j;
        const float xx = own[i] / divisor, yy = own[i + 1] / divisor, zz = own[i + 2] / divisor;
        const float xy = next[i] / divisor, yz = next[i + 1] / divisor, xz = second[i] / divisor;
        const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
        std::copy_n(matrix, 9, covariance + 9 * j);
    }
}

// One frame's view, with memory for its joints.
class View {
   public:
    explicit View(int64_t joints)
        : joints_(joints),
          seen_(static_cast<std::size_t>(joints)),
          variances_(static_cast<std::size_t>(joints)),
          offsets_(static_cast<std::size_t>(joints)) {
        frame_.of = seen_.data();
    }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    const SeenFrame& frame() const { return frame_; }

    void look(const double* keypoints, const double* confidence, const double* camera, float part) {
        for (int64_t j = 0; j < joints_; ++j) frame_.of[j].look(keypoints + 2 * j, confidence[j], camera, part);
        frame_.sum_up(camera, joints_);
    }

    // Multiplies the shares by what the hypotheses say of them, see SeenJoint::trust.
    void trust(const float* poses, const float* roots, int64_t count) {
        float *variances = variances_.data(), *offsets = offsets_.data(), mean_offset = 0.0f, present = 0.0f;
        for (int64_t j = 0; j < joints_; ++j) {
            float mean_x = 0.0f, mean_y = 0.0f;
            const auto seen = [&](int64_t h, int axis) {
                return across(poses + (h * joints_ + j) * 3, roots + 3 * h, axis);
            };
            for (int64_t h = 0; h < count; ++h) mean_x += seen(h, 0), mean_y += seen(h, 1);
            mean_x /= static_cast<float>(count), mean_y /= static_cast<float>(count);
            float variance = 0.0f;
            for (int64_t h = 0; h < count; ++h) {
                const float x = seen(h, 0) - mean_x, y = seen(h, 1) - mean_y;
                variance += x * x + y * y;
            }
            variances[j] = variance / static_cast<float>(count);
            offsets[j] = frame_.of[j].offset(mean_x, mean_y);
            if (frame_.of[j].weight > 0.0f) mean_offset += offsets[j], present += 1.0f;
        }
        mean_offset /= present;
        for (int64_t j = 0; j < joints_; ++j) frame_.of[j].trust(variances[j], offsets[j], mean_offset);
    }

    // sum += factor * the pose moved towards its rays, root-relative.
    void add_refined(const float* pose, const float* root, float factor, float* sum) const {
        if (!is_placed(root)) {
            for (int64_t i = 0; i < 3 * joints_; ++i) sum[i] += factor * pose[i];
            return;
        }
        float first[3] = {};
        for (int64_t j = 0; j < joints_; ++j) {
            float moved[3];
            frame_.of[j].move(pose + 3 * j, root, moved);
            if (j == 0) std::copy_n(moved, 3, first);
            for (int axis = 0; axis < 3; ++axis) sum[3 * j + axis] += factor * (moved[axis] - first[axis]);
        }
    }

   private:
    int64_t joints_;
    std::vector<SeenJoint> seen_;
    std::vector<float> variances_, offsets_;
    SeenFrame frame_ = {};
};

// Errors become weights: exp(-error / (temperature side)) over their sum, or equal if no hypothesis can be placed.
void weigh(float* errors, int64_t count, float side, float temperature) {
    float lowest = kInfinity;
    for (int64_t h = 0; h < count; ++h) {
        const float cost = errors[h] / (side * temperature);
        errors[h] = std::isnan(cost) ? kInfinity : cost;
        lowest = std::min(lowest, errors[h]);
    }
    float total = 0.0f;
    for (int64_t h = 0; h < count; ++h) {
        errors[h] = lowest == kInfinity ? 1.0f : std::exp(lowest - errors[h]);
        total += errors[h];
    }
    for (int64_t h = 0; h < count; ++h) errors[h] /= total;
}

}  // namespace

void launch_hypothesis_statistics(const float* hypotheses, const Reprojection& reprojection, float* mean,
                                  float* covariance, float* weights, float* weighted_mean, HypothesisSizes sizes,
                                  int num_threads) {
    const int64_t count = sizes.num_hypotheses, joints = sizes.num_joints, numel = 3 * joints;
    const int64_t useful = std::max<int64_t>(1, sizes.num_frames * count * numel / kMinElementsPerThread);
    const int threads = static_cast<int>(std::min({static_cast<int64_t>(num_threads), useful, sizes.num_frames}));
    parallel(threads, [&](int index, int parts) {
        std::vector<float> scratch(static_cast<std::size_t>(4 * numel + 2)), roots(static_cast<std::size_t>(3 * count));
        View view(joints);
        for (int64_t b = sizes.num_frames * index / parts; b < sizes.num_frames * (index + 1) / parts; ++b) {
            const float* poses = hypotheses + b * count * numel;
            moments(poses, count, joints, mean + b * numel, covariance + 3 * b * numel, scratch.data());
            if (reprojection.keypoints_2d == nullptr) continue;
            view.look(reprojection.keypoints_2d + 2 * b * joints, reprojection.confidence + b * joints,
                      reprojection.cameras + (reprojection.shared_camera ? 0 : 4 * b), reprojection.weight);
            float* score = weights + b * count;
            for (int64_t h = 0; h < count; ++h) {
                float* root = roots.data() + 3 * h;
                view.frame().place(poses + h * numel, joints, root);
                score[h] = view.frame().error(poses + h * numel, joints, root);
            }
            view.trust(poses, roots.data(), count);
            weigh(score, count, 2.0f * view.frame().half_side, reprojection.temperature);
            std::fill_n(weighted_mean + b * numel, numel, 0.0f);
            for (int64_t h = 0; h < count; ++h) {
                view.add_refined(poses + h * numel, roots.data() + 3 * h, score[h], weighted_mean + b * numel);
            }
        }
    });
}

}  // namespace diffupose
