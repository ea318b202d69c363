// One step of the reverse process for one pose, in place:
//
//   x0     = p x_t + q out                              clipped to +-clip
//   x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s scale z
//
// A term whose coefficient is 0 is skipped, so that a NaN in it does not matter.
#pragma once

#include <cstdint>

namespace diffupose {

inline void reverse_step_row(const float* row,  // p, q, c_x, c_0, c_1, s
                             float clip, int64_t joints, const float* output,
                             int64_t output_stride,  // [J, stride], three channels count
                             const float* z,         // [J, 3], read where s is not 0
                             const float* scale,     // [J, 3], or null for 1
                             float* x,               // [J, 3], x_t and then x_prev
                             float* x0_last) {       // [J, 3], replaced by x0; or null
    const float p = row[0], q = row[1], c_x = row[2], c_0 = row[3], c_1 = row[4], s = row[5];
    for (int64_t j = 0; j < joints; ++j) {
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t i = 3 * j + axis;
            const float from_x = p != 0.0f ? p * x[i] : 0.0f;
            float x0 = q != 0.0f ? (p != 0.0f ? from_x + q * output[j * output_stride + axis]
                                              : q * output[j * output_stride + axis])
                                 : from_x;
            x0 = x0 > clip ? clip : (x0 < -clip ? -clip : x0);
            float next = 0.0f;
            bool any = false;
            const auto add = [&](float coefficient, float value) {
                next = any ? next + coefficient * value : coefficient * value;
                any = true;
            };
            if (c_x != 0.0f) add(c_x, x[i]);
            if (c_0 != 0.0f) add(c_0, x0);
            if (c_1 != 0.0f) add(c_1, x0_last[i]);
            if (s != 0.0f) add(s, scale == nullptr ? z[i] : scale[i] * z[i]);
            x[i] = next;
            if (x0_last != nullptr) x0_last[i] = x0;
        }
    }
}

}  // namespace diffupose
