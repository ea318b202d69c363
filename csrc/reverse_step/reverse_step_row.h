// One step of the reverse process for one pose on the CPU, in place; the formula of reverse_step_element.h. It is
// written with a loop for each term, of which compilers make vectors: a call of those functions for each number took
// five times as long (240 and 43 ns for 17 joints), and gave the same bits.
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
    const float p = row[0], q = row[1], s = row[5];
    // Few enough numbers at a time to stay in the nearest cache.
    constexpr int64_t kBlock = 16;
    for (int64_t first = 0; first < joints; first += kBlock) {
        const int64_t count = joints - first < kBlock ? joints - first : kBlock, numel = 3 * count;
        float* x_t = x + 3 * first;
        float* last = x0_last == nullptr ? nullptr : x0_last + 3 * first;
        float x0[3 * kBlock], next[3 * kBlock], term[3 * kBlock];
        if (q != 0.0f) {
            for (int64_t j = 0; j < count; ++j) {
                for (int axis = 0; axis < 3; ++axis) x0[3 * j + axis] = q * output[(first + j) * output_stride + axis];
            }
        }
        if (p != 0.0f && q != 0.0f) {
            for (int64_t i = 0; i < numel; ++i) x0[i] = p * x_t[i] + x0[i];
        } else if (q == 0.0f) {
            for (int64_t i = 0; i < numel; ++i) x0[i] = p != 0.0f ? p * x_t[i] : 0.0f;
        }
        // NaN stays NaN.
        for (int64_t i = 0; i < numel; ++i) x0[i] = x0[i] > clip ? clip : (x0[i] < -clip ? -clip : x0[i]);
        bool any = false;
        const auto add = [&](float coefficient, const float* values) {
            if (any) {
                for (int64_t i = 0; i < numel; ++i) next[i] += coefficient * values[i];
            } else {
                for (int64_t i = 0; i < numel; ++i) next[i] = coefficient * values[i];
            }
            any = true;
        };
        if (row[2] != 0.0f) add(row[2], x_t);
        if (row[3] != 0.0f) add(row[3], x0);
        if (row[4] != 0.0f) add(row[4], last);
        if (s != 0.0f) {
            const float* noise = z + 3 * first;
            for (int64_t i = 0; i < numel; ++i) term[i] = scale == nullptr ? noise[i] : scale[3 * first + i] * noise[i];
            add(s, term);
        }
        for (int64_t i = 0; i < numel; ++i) x_t[i] = any ? next[i] : 0.0f;
        if (last != nullptr) {
            for (int64_t i = 0; i < numel; ++i) last[i] = x0[i];
        }
    }
}

}  // namespace diffupose
