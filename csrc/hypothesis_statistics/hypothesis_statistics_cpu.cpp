#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {
namespace {

constexpr float kNan = NAN, kInfinity = INFINITY;
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

struct Root {
    float x, y, z;

    bool is_placed() const { return std::isfinite(x) && std::isfinite(y) && std::isfinite(z); }
};

// What is seen of one frame, and how well a pose fits it.
class View {
   public:
    explicit View(int64_t joints)
        : joints_(joints),
          doubles_(static_cast<std::size_t>(3 * joints)),
          floats_(static_cast<std::size_t>(8 * joints)) {
        double** of_doubles[] = {&u_, &v_, &w_};
        for (int i = 0; i < 3; ++i) *of_doubles[i] = doubles_.data() + i * joints;
        float** of_floats[] = {&seen_x_, &seen_y_, &weight_, &share_, &ray_x_, &ray_y_, &variances_, &offsets_};
        for (int i = 0; i < 8; ++i) *of_floats[i] = floats_.data() + i * joints;
    }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    // Half the longer side of the keypoints' box, in pixels.
    float half_side() const { return half_side_; }

    void look(const double* keypoints, const double* confidence, const double* camera, float part) {
        fx_ = static_cast<float>(camera[0]), fy_ = static_cast<float>(camera[1]);
        cx_ = static_cast<float>(camera[2]), cy_ = static_cast<float>(camera[3]);
        for (int64_t j = 0; j < joints_; ++j) {
            w_[j] = confidence[j];
            const bool present = w_[j] > 0.0;
            const double x = present ? keypoints[2 * j] : 0.0, y = present ? keypoints[2 * j + 1] : 0.0;
            u_[j] = present ? (x - camera[2]) / camera[0] : 0.0;
            v_[j] = present ? (y - camera[3]) / camera[1] : 0.0;
            seen_x_[j] = static_cast<float>(x), seen_y_[j] = static_cast<float>(y);
            weight_[j] = static_cast<float>(w_[j]);
            share_[j] = part * (1.0f < weight_[j] ? 1.0f : weight_[j]);
            ray_x_[j] = present ? (seen_x_[j] - cx_) / fx_ : 0.0f;
            ray_y_[j] = present ? (seen_y_[j] - cy_) / fy_ : 0.0f;
        }
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
        double sum_u = 0.0, sum_v = 0.0;
        total_ = 0.0, total_weight_ = 0.0f;
        for (int64_t j = 0; j < joints_; ++j) {
            total_ += w_[j], sum_u += w_[j] * u_[j], sum_v += w_[j] * v_[j];
            total_weight_ += weight_[j];
            if (!(w_[j] > 0.0)) continue;
            low_x = std::min(low_x, seen_x_[j]), high_x = std::max(high_x, seen_x_[j]);
            low_y = std::min(low_y, seen_y_[j]), high_y = std::max(high_y, seen_y_[j]);
        }
        mean_u_ = sum_u / total_, mean_v_ = sum_v / total_;
        spread_ = 0.0;
        for (int64_t j = 0; j < joints_; ++j) {
            spread_ += w_[j] * ((u_[j] - mean_u_) * (u_[j] - mean_u_) + (v_[j] - mean_v_) * (v_[j] - mean_v_));
        }
        half_side_ = std::max(0.5f * std::max(high_x - low_x, high_y - low_y), 1e-6f);
    }

    // The root by weighted linear least squares: t_x - u t_z = u Z - X, and the same for y; NaN where it is free.
    Root place(const float* pose) const {
        if (!(spread_ > 1e-20 * total_)) return {kNan, kNan, kNan};
        double right_x = 0.0, right_y = 0.0, right_z = 0.0;
        for (int64_t j = 0; j < joints_; ++j) {
            const double z = static_cast<double>(pose[3 * j + 2]);
            const double x = u_[j] * z - static_cast<double>(pose[3 * j]);
            const double y = v_[j] * z - static_cast<double>(pose[3 * j + 1]);
            right_x += w_[j] * x, right_y += w_[j] * y;
            right_z -= w_[j] * ((u_[j] - mean_u_) * x + (v_[j] - mean_v_) * y);
        }
        const double z = right_z / spread_;
        return {static_cast<float>(right_x / total_ + mean_u_ * z), static_cast<float>(right_y / total_ + mean_v_ * z),
                static_cast<float>(z)};
    }

    // Weighted mean distance of the placed pose from the keypoints, in pixels.
    float error(const float* pose, const Root& root) const {
        float sum = 0.0f;
        for (int64_t j = 0; j < joints_; ++j) {
            if (!(weight_[j] > 0.0f)) continue;
            const float z = pose[3 * j + 2] + root.z;
            float distance = kInfinity;  // behind the camera there is no image
            if (z > 1e-3f) {
                const float x = fx_ * ((pose[3 * j] + root.x) / z) + cx_ - seen_x_[j];
                const float y = fy_ * ((pose[3 * j + 1] + root.y) / z) + cy_ - seen_y_[j];
                distance = std::sqrt(x * x + y * y);
            }
            sum += distance * weight_[j];
        }
        return sum / total_weight_;
    }

    // Multiplies each joint's share by S / (S + R), 0 where that is no number. S is the joint's variance across the
    // image over the hypotheses. R is the squared distance of its keypoint from their mean, or the average over all
    // joints if that is more.
    void trust(const float* poses, const Root* roots, int64_t count) {
        float mean_offset = 0.0f, present = 0.0f;
        for (int64_t j = 0; j < joints_; ++j) {
            float mean_x = 0.0f, mean_y = 0.0f, variance = 0.0f;
            // Where the joint is seen, in focal lengths.
            const auto seen = [&](int64_t h) {
                const float *joint = poses + (h * joints_ + j) * 3, z = joint[2] + roots[h].z;
                return std::array<float, 2>{(joint[0] + roots[h].x) / z, (joint[1] + roots[h].y) / z};
            };
            for (int64_t h = 0; h < count; ++h) {
                const auto [x, y] = seen(h);
                mean_x += x, mean_y += y;
            }
            mean_x /= static_cast<float>(count), mean_y /= static_cast<float>(count);
            for (int64_t h = 0; h < count; ++h) {
                const auto [x, y] = seen(h);
                variance += (x - mean_x) * (x - mean_x) + (y - mean_y) * (y - mean_y);
            }
            variances_[j] = variance / static_cast<float>(count);
            const float off_x = mean_x - ray_x_[j], off_y = mean_y - ray_y_[j];
            offsets_[j] = off_x * off_x + off_y * off_y;
            if (weight_[j] > 0.0f) mean_offset += offsets_[j], present += 1.0f;
        }
        mean_offset /= present;
        for (int64_t j = 0; j < joints_; ++j) {
            const float larger = offsets_[j] > mean_offset ? offsets_[j] : mean_offset;
            const float part = variances_[j] / (variances_[j] + larger);
            share_[j] = std::isfinite(part) ? share_[j] * part : 0.0f;
        }
    }

    // sum += factor * the pose moved towards its rays, root-relative.
    void add_refined(const float* pose, const Root& root, float factor, float* sum) const {
        if (!root.is_placed()) {
            for (int64_t i = 0; i < 3 * joints_; ++i) sum[i] += factor * pose[i];
            return;
        }
        float first[3] = {};
        for (int64_t j = 0; j < joints_; ++j) {
            const float x = pose[3 * j] + root.x, y = pose[3 * j + 1] + root.y, z = pose[3 * j + 2] + root.z;
            const float moved[3] = {x + share_[j] * (ray_x_[j] * z - x), y + share_[j] * (ray_y_[j] * z - y), z};
            if (j == 0) std::copy_n(moved, 3, first);
            for (int axis = 0; axis < 3; ++axis) sum[3 * j + axis] += factor * (moved[axis] - first[axis]);
        }
    }

   private:
    int64_t joints_;
    std::vector<double> doubles_;
    std::vector<float> floats_;
    // Of each joint. For the root's position in float64: normal equations lose digits.
    double *u_, *v_, *w_;
    // Of each joint, for errors, in pixels, and for the way to the viewing rays.
    float *seen_x_, *seen_y_, *weight_, *share_, *ray_x_, *ray_y_, *variances_, *offsets_;
    double total_, mean_u_, mean_v_, spread_;
    float fx_, fy_, cx_, cy_, total_weight_, half_side_;
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
        const bool seen = reprojection.keypoints_2d != nullptr;
        std::vector<float> scratch(static_cast<std::size_t>(4 * numel + 2));
        std::vector<Root> roots(static_cast<std::size_t>(seen ? count : 0));
        View view(seen ? joints : 0);
        for (int64_t b = sizes.num_frames * index / parts; b < sizes.num_frames * (index + 1) / parts; ++b) {
            const float* poses = hypotheses + b * count * numel;
            moments(poses, count, joints, mean + b * numel, covariance + 3 * b * numel, scratch.data());
            if (!seen) continue;
            view.look(reprojection.keypoints_2d + 2 * b * joints, reprojection.confidence + b * joints,
                      reprojection.cameras + (reprojection.shared_camera ? 0 : 4 * b), reprojection.weight);
            float* score = weights + b * count;
            for (int64_t h = 0; h < count; ++h) {
                roots[h] = view.place(poses + h * numel);
                score[h] = view.error(poses + h * numel, roots[h]);
            }
            view.trust(poses, roots.data(), count);
            weigh(score, count, 2.0f * view.half_side(), reprojection.temperature);
            std::fill_n(weighted_mean + b * numel, numel, 0.0f);
            for (int64_t h = 0; h < count; ++h) {
                view.add_refined(poses + h * numel, roots[h], score[h], weighted_mean + b * numel);
            }
        }
    });
}

}  // namespace diffupose
