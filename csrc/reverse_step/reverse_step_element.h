// One step of the reverse process for one number, for the host and the device:
//
//   x0     = p x_t + q out                              clipped to +-clip
//   x_prev = c_x x_t + c_0 x0 + c_1 x0_last + s scale z
//
// A term whose coefficient is 0 is skipped, so that a NaN in it does not matter.
#pragma once

#include "common/host_device.h"

namespace diffupose {

// A row of StepTable.
struct StepRow {
    float p, q, c_x, c_0, c_1, s;
};

// x0
DIFFUPOSE_HOST_DEVICE inline float predicted_x0(const StepRow& row, float clip, float x_t, float output) {
    float x0 = 0.0f;
    if (row.q != 0.0f) x0 = row.q * output;
    if (row.p != 0.0f) x0 = row.p * x_t + x0;
    return x0 > clip ? clip : (x0 < -clip ? -clip : x0);  // NaN stays NaN
}

// x_prev; `noise` is scale z.
DIFFUPOSE_HOST_DEVICE inline float previous_sample(const StepRow& row, float x_t, float x0, float x0_last,
                                                   float noise) {
    float x = 0.0f;
    if (row.c_x != 0.0f) x += row.c_x * x_t;
    if (row.c_0 != 0.0f) x += row.c_0 * x0;
    if (row.c_1 != 0.0f) x += row.c_1 * x0_last;
    if (row.s != 0.0f) x += row.s * noise;
    return x;
}

}  // namespace diffupose
