// What is seen of one frame, and how well a pose fits it: the formulas that the C++ code and the CUDA kernel for many
// hypotheses share.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace diffupose {

// Not from <limits>, whose functions CUDA code cannot call.
constexpr float kNan = NAN, kInfinity = INFINITY;

struct SeenJoint {
    double u, v, w;                                     // for the root's position: normal equations lose digits
    float seen_x, seen_y, weight, share, ray_x, ray_y;  // for errors, in pixels, and for the way to the viewing rays

    template <typename T>
    DIFFUPOSE_HOST_DEVICE void look(const T* keypoint, T confidence, const double* camera, float part) {
        w = static_cast<double>(confidence);
        const bool present = w > 0.0;
        const double x = present ? static_cast<double>(keypoint[0]) : 0.0;
        const double y = present ? static_cast<double>(keypoint[1]) : 0.0;
        u = present ? (x - camera[2]) / camera[0] : 0.0;
        v = present ? (y - camera[3]) / camera[1] : 0.0;
        seen_x = static_cast<float>(x), seen_y = static_cast<float>(y);
        weight = static_cast<float>(w);
        share = part * (1.0f < weight ? 1.0f : weight);
        ray_x = present ? (seen_x - static_cast<float>(camera[2])) / static_cast<float>(camera[0]) : 0.0f;
        ray_y = present ? (seen_y - static_cast<float>(camera[3])) / static_cast<float>(camera[1]) : 0.0f;
    }

    // Squared distance of the keypoint from where the hypotheses have it on average.
    DIFFUPOSE_HOST_DEVICE float offset(float mean_x, float mean_y) const {
        return (mean_x - ray_x) * (mean_x - ray_x) + (mean_y - ray_y) * (mean_y - ray_y);
    }

    // Multiplies the share by S / (S + R), 0 where that is no number. S is the joint's variance across the image over
    // the hypotheses. R is the squared distance of its keypoint from their mean, or the average over all joints if that
    // is more.
    DIFFUPOSE_HOST_DEVICE void trust(float variance, float offset, float mean_offset) {
        const float larger = offset > mean_offset ? offset : mean_offset;
        const float part = variance / (variance + larger);
        share = std::isfinite(part) ? share * part : 0.0f;
    }

    // This joint of a placed pose, moved towards its ray.
    DIFFUPOSE_HOST_DEVICE void move(const float* joint, const float* root, float* moved) const {
        const float x = joint[0] + root[0], y = joint[1] + root[1], z = joint[2] + root[2];
        moved[0] = x + share * (ray_x * z - x);
        moved[1] = y + share * (ray_y * z - y);
        moved[2] = z;
    }
};

struct SeenFrame {
    SeenJoint* of;  // each joint
    double total, mean_u, mean_v, spread;
    float fx, fy, cx, cy, total_weight, half_side;

    // After all joints.
    DIFFUPOSE_HOST_DEVICE void sum_up(const double* camera, int64_t joints) {
        fx = static_cast<float>(camera[0]), fy = static_cast<float>(camera[1]);
        cx = static_cast<float>(camera[2]), cy = static_cast<float>(camera[3]);
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
        double sum_u = 0.0, sum_v = 0.0;
        total = 0.0, total_weight = 0.0f;
        for (int64_t j = 0; j < joints; ++j) {
            total += of[j].w, sum_u += of[j].w * of[j].u, sum_v += of[j].w * of[j].v;
            total_weight += of[j].weight;
            if (!(of[j].w > 0.0)) continue;
            low_x = of[j].seen_x < low_x ? of[j].seen_x : low_x, high_x = high_x < of[j].seen_x ? of[j].seen_x : high_x;
            low_y = of[j].seen_y < low_y ? of[j].seen_y : low_y, high_y = high_y < of[j].seen_y ? of[j].seen_y : high_y;
        }
        mean_u = sum_u / total, mean_v = sum_v / total;
        spread = 0.0;
        for (int64_t j = 0; j < joints; ++j) {
            spread += of[j].w * ((of[j].u - mean_u) * (of[j].u - mean_u) + (of[j].v - mean_v) * (of[j].v - mean_v));
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
            const double x = of[j].u * z - static_cast<double>(pose[3 * j]);
            const double y = of[j].v * z - static_cast<double>(pose[3 * j + 1]);
            right_x += of[j].w * x, right_y += of[j].w * y;
            right_z -= of[j].w * ((of[j].u - mean_u) * x + (of[j].v - mean_v) * y);
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
            if (!(of[j].weight > 0.0f)) continue;
            const float z = pose[3 * j + 2] + root[2];
            float distance = kInfinity;  // behind the camera there is no image
            if (z > 1e-3f) {
                const float x = fx * ((pose[3 * j] + root[0]) / z) + cx - of[j].seen_x;
                const float y = fy * ((pose[3 * j + 1] + root[1]) / z) + cy - of[j].seen_y;
                distance = std::sqrt(x * x + y * y);
            }
            sum += distance * of[j].weight;
        }
        return sum / total_weight;
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
