// What is seen of one frame, and how well a pose fits it: the formulas that the C++ and the CUDA code share.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace diffupose {

// Not from <limits>, whose functions CUDA code cannot call.
constexpr float kNan = NAN, kInfinity = INFINITY;

struct SeenFrame {
    // Of each joint. For the root's position in float64: normal equations lose digits.
    double *u, *v, *w;
    // For the errors, in pixels, and for the way to the viewing rays.
    float *seen_x, *seen_y, *weight, *share, *ray_x, *ray_y;
    // Of all of them.
    double total, mean_u, mean_v, spread;
    float fx, fy, cx, cy, total_weight, half_side;

    template <typename T>
    DIFFUPOSE_HOST_DEVICE void look_at_joint(const T* keypoints, const T* confidence, const double* camera, float part,
                                             int64_t j) {
        w[j] = static_cast<double>(confidence[j]);
        const bool present = w[j] > 0.0;
        const double x = present ? static_cast<double>(keypoints[2 * j]) : 0.0;
        const double y = present ? static_cast<double>(keypoints[2 * j + 1]) : 0.0;
        u[j] = present ? (x - camera[2]) / camera[0] : 0.0;
        v[j] = present ? (y - camera[3]) / camera[1] : 0.0;
        seen_x[j] = static_cast<float>(x), seen_y[j] = static_cast<float>(y);
        weight[j] = static_cast<float>(w[j]);
        share[j] = part * (1.0f < weight[j] ? 1.0f : weight[j]);
        ray_x[j] = present ? (seen_x[j] - static_cast<float>(camera[2])) / static_cast<float>(camera[0]) : 0.0f;
        ray_y[j] = present ? (seen_y[j] - static_cast<float>(camera[3])) / static_cast<float>(camera[1]) : 0.0f;
    }

    // After all joints.
    DIFFUPOSE_HOST_DEVICE void sum_up(const double* camera, int64_t joints) {
        fx = static_cast<float>(camera[0]), fy = static_cast<float>(camera[1]);
        cx = static_cast<float>(camera[2]), cy = static_cast<float>(camera[3]);
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
        double sum_u = 0.0, sum_v = 0.0;
        total = 0.0, total_weight = 0.0f;
        for (int64_t j = 0; j < joints; ++j) {
            total += w[j], sum_u += w[j] * u[j], sum_v += w[j] * v[j];
            total_weight += weight[j];
            if (!(w[j] > 0.0)) continue;
            low_x = seen_x[j] < low_x ? seen_x[j] : low_x, high_x = high_x < seen_x[j] ? seen_x[j] : high_x;
            low_y = seen_y[j] < low_y ? seen_y[j] : low_y, high_y = high_y < seen_y[j] ? seen_y[j] : high_y;
        }
        mean_u = sum_u / total, mean_v = sum_v / total;
        spread = 0.0;
        for (int64_t j = 0; j < joints; ++j) {
            spread += w[j] * ((u[j] - mean_u) * (u[j] - mean_u) + (v[j] - mean_v) * (v[j] - mean_v));
        }
        const float width = high_x - low_x, height = high_y - low_y, half = 0.5f * (width < height ? height : width);
        half_side = half < 1e-6f ? 1e-6f : half;
    }

    // The root by weighted linear least squares: t_x - u t_z = u Z - X, and the same for y; NaN where it is free.
    DIFFUPOSE_HOST_DEVICE void place(const float* pose, int64_t joints, float* root) const {
        if (!(spread > 1e-20 * total)) {
            root[0] = root[1] = root[2] = kNan;
            return;
        }
        double right_x = 0.0, right_y = 0.0, right_z = 0.0;
        for (int64_t j = 0; j < joints; ++j) {
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
    DIFFUPOSE_HOST_DEVICE float error(const float* pose, int64_t joints, const float* root) const {
        float sum = 0.0f;
        for (int64_t j = 0; j < joints; ++j) {
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

    // Squared distance of a joint's keypoint from where the hypotheses have it on average.
    DIFFUPOSE_HOST_DEVICE float offset(int64_t j, float mean_x, float mean_y) const {
        return (mean_x - ray_x[j]) * (mean_x - ray_x[j]) + (mean_y - ray_y[j]) * (mean_y - ray_y[j]);
    }

    // Multiplies a joint's share by S / (S + R), 0 where it has no value.
    DIFFUPOSE_HOST_DEVICE void trust(int64_t j, float variance, float offset, float mean_offset) {
        const float larger = offset > mean_offset ? offset : mean_offset;
        const float part = variance / (variance + larger);
        share[j] = std::isfinite(part) ? share[j] * part : 0.0f;
    }

    // A joint of a placed pose, moved towards its ray.
    DIFFUPOSE_HOST_DEVICE void move(const float* pose, int64_t j, const float* root, float* moved) const {
        const float x = pose[3 * j] + root[0], y = pose[3 * j + 1] + root[1], z = pose[3 * j + 2] + root[2];
        moved[0] = x + share[j] * (ray_x[j] * z - x);
        moved[1] = y + share[j] * (ray_y[j] * z - y);
        moved[2] = z;
    }
};

DIFFUPOSE_HOST_DEVICE inline bool is_placed(const float* root) {
    return std::isfinite(root[0]) && std::isfinite(root[1]) && std::isfinite(root[2]);
}

// Where a joint of a placed pose is seen, in focal lengths.
DIFFUPOSE_HOST_DEVICE inline float across(const float* joint, const float* root, int axis) {
    return (joint[axis] + root[axis]) / (joint[2] + root[2]);
}

}  // namespace diffupose
