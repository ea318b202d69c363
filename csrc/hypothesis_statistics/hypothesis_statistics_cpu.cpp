#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "hypothesis_statistics/hypothesis_statistics.h"

namespace diffupose {
namespace {

// Below this a second thread costs more (microseconds to wake it) than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 14;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

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
    // Products of a number with itself, its next and its second next: of every three, the six that are wanted. What the
    // last ones take from behind the pose is not used.
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

// One frame's view: what its hypotheses share.
struct View {
    // For the root's position, in float64: normal equations lose digits.
    std::vector<double> u, v, w;
    double total, mean_u, mean_v, spread;
    // For the errors, in pixels, and for the way to the viewing rays.
    std::vector<float> seen_x, seen_y, weight, share, ray_x, ray_y, spread_of, offset;
    float fx, fy, cx, cy, total_weight, half_side;

    explicit View(int64_t joints) {
        for (auto* values : {&u, &v, &w}) values->resize(static_cast<std::size_t>(joints));
        for (auto* values : {&seen_x, &seen_y, &weight, &share, &ray_x, &ray_y, &spread_of, &offset}) {
            values->resize(static_cast<std::size_t>(joints));
        }
    }

    void look(const double* keypoints, const double* confidence, const double* camera, float part, int64_t joints) {
        fx = static_cast<float>(camera[0]), fy = static_cast<float>(camera[1]);
        cx = static_cast<float>(camera[2]), cy = static_cast<float>(camera[3]);
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
        double sum_u = 0.0, sum_v = 0.0;
        total = 0.0, total_weight = 0.0f;
        for (int64_t i = 0; i < joints; ++i) {
            const std::size_t j = static_cast<std::size_t>(i);
            const bool present = confidence[i] > 0.0;
            const double x = present ? keypoints[2 * i] : 0.0, y = present ? keypoints[2 * i + 1] : 0.0;
            w[j] = confidence[i];
            u[j] = present ? (x - camera[2]) / camera[0] : 0.0;
            v[j] = present ? (y - camera[3]) / camera[1] : 0.0;
            total += w[j], sum_u += w[j] * u[j], sum_v += w[j] * v[j];
            seen_x[j] = static_cast<float>(x), seen_y[j] = static_cast<float>(y);
            weight[j] = static_cast<float>(confidence[i]);
            total_weight += weight[j];
            share[j] = part * std::min(weight[j], 1.0f);
            ray_x[j] = present ? (seen_x[j] - cx) / fx : 0.0f;
            ray_y[j] = present ? (seen_y[j] - cy) / fy : 0.0f;
            if (!present) continue;
            low_x = std::min(low_x, seen_x[j]), high_x = std::max(high_x, seen_x[j]);
            low_y = std::min(low_y, seen_y[j]), high_y = std::max(high_y, seen_y[j]);
        }
        mean_u = sum_u / total, mean_v = sum_v / total;
        spread = 0.0;
        for (std::size_t j = 0; j < w.size(); ++j) {
            spread += w[j] * ((u[j] - mean_u) * (u[j] - mean_u) + (v[j] - mean_v) * (v[j] - mean_v));
        }
        half_side = std::max(0.5f * std::max(high_x - low_x, high_y - low_y), 1e-6f);
    }

    // The root by weighted linear least squares: t_x - u t_z = u Z - X, and the same for y; NaN where it is free.
    void place(const float* pose, float* root) const {
        if (!(spread > 1e-20 * total)) {
            root[0] = root[1] = root[2] = kNan;
            return;
        }
        double right_x = 0.0, right_y = 0.0, right_z = 0.0;
        for (std::size_t j = 0; j < w.size(); ++j) {
            const double z = static_cast<double>(pose[3 * j + 2]);
            const double x = u[j] * z - static_cast<double>(pose[3 * j]);
            const double y = v[j] * z - static_cast<double>(pose[3 * j + 1]);
            right_x += w[j] * x, right_y += w[j] * y;
            right_z -= w[j] * ((u[j] - mean_u) * x + (v[j] - mean_v) * y);
        }
        const double z = right_z / spread;
        root[0] = static_cast<float>(right_x / total + mean_u * z);
        root[1] = static_cast<float>(right_y / total + mean_v * z);
        root[2] = static_cast<float>(z);
    }

    // Weighted mean distance of the placed pose from the keypoints, in pixels.
    float error(const float* pose, const float* root) const {
        float sum = 0.0f;
        for (std::size_t j = 0; j < w.size(); ++j) {
            if (!(weight[j] > 0.0f)) continue;
            const float z = pose[3 * j + 2] + root[2];
            float distance = kInfinity;  // behind the camera there is no image
            if (z > 1e-3f) {
                const float x = fx * ((pose[3 * j] + root[0]) / z) + cx - seen_x[j];
                const float y = fy * ((pose[3 * j + 1] + root[1]) / z) + cy - seen_y[j];
                distance = std::sqrt(x * x + y * y);
            }
            sum += distance * weight[j];
        }
        return sum / total_weight;
    }

    // Multiplies the shares by S / (S + R): S is a joint's variance across the image over the hypotheses, R the squared
    // distance of its keypoint from their mean, or that of all joints on average if that is more.
    void trust(const float* poses, const float* roots, int64_t count) {
        const std::size_t joints = w.size();
        float mean_offset = 0.0f, present = 0.0f;
        for (std::size_t j = 0; j < joints; ++j) {
            float mean_x = 0.0f, mean_y = 0.0f;
            const auto across = [&](int64_t h, int axis) {
                const float* joint = poses + (static_cast<std::size_t>(h) * joints + j) * 3;
                return (joint[axis] + roots[3 * h + axis]) / (joint[2] + roots[3 * h + 2]);
            };
            for (int64_t h = 0; h < count; ++h) mean_x += across(h, 0), mean_y += across(h, 1);
            mean_x /= static_cast<float>(count), mean_y /= static_cast<float>(count);
            float variance = 0.0f;
            for (int64_t h = 0; h < count; ++h) {
                const float x = across(h, 0) - mean_x, y = across(h, 1) - mean_y;
                variance += x * x + y * y;
            }
            spread_of[j] = variance / static_cast<float>(count);
            offset[j] = (mean_x - ray_x[j]) * (mean_x - ray_x[j]) + (mean_y - ray_y[j]) * (mean_y - ray_y[j]);
            if (weight[j] > 0.0f) mean_offset += offset[j], present += 1.0f;
        }
        mean_offset /= present;
        for (std::size_t j = 0; j < joints; ++j) {
            const float larger = offset[j] > mean_offset ? offset[j] : mean_offset;
            const float part = spread_of[j] / (spread_of[j] + larger);
            share[j] = std::isfinite(part) ? share[j] * part : 0.0f;
        }
    }

    // sum += factor * the pose moved towards its rays, root-relative.
    void add_refined(const float* pose, const float* root, float factor, float* sum) const {
        if (!(std::isfinite(root[0]) && std::isfinite(root[1]) && std::isfinite(root[2]))) {
            for (std::size_t i = 0; i < 3 * w.size(); ++i) sum[i] += factor * pose[i];
            return;
        }
        float first[3] = {};
        for (std::size_t j = 0; j < w.size(); ++j) {
            const float z = pose[3 * j + 2] + root[2];
            float moved[3] = {pose[3 * j] + root[0], pose[3 * j + 1] + root[1], z};
            moved[0] += share[j] * (ray_x[j] * z - moved[0]);
            moved[1] += share[j] * (ray_y[j] * z - moved[1]);
            if (j == 0) std::copy_n(moved, 3, first);
            for (int axis = 0; axis < 3; ++axis) sum[3 * j + axis] += factor * (moved[axis] - first[axis]);
        }
    }
};

// exp(-error / (temperature side)) over their sum; all alike where no hypothesis can be placed.
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
                      reprojection.cameras + (reprojection.shared_camera ? 0 : 4 * b), reprojection.weight, joints);
            float* score = weights + b * count;
            for (int64_t h = 0; h < count; ++h) {
                float* root = roots.data() + 3 * h;
                view.place(poses + h * numel, root);
                score[h] = view.error(poses + h * numel, root);
            }
            view.trust(poses, roots.data(), count);
            weigh(score, count, 2.0f * view.half_side, reprojection.temperature);
            std::fill_n(weighted_mean + b * numel, numel, 0.0f);
            for (int64_t h = 0; h < count; ++h) {
                view.add_refined(poses + h * numel, roots.data() + 3 * h, score[h], weighted_mean + b * numel);
            }
        }
    });
}

}  // namespace diffupose
