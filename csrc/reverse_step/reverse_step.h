// reverse_step: one step of the reverse process for all hypotheses; the formula stands in reverse_step_element.h.
#pragma once

#include <cstdint>

namespace diffupose {

struct ReverseStepSizes {
    int64_t num_frames;      // B
    int64_t num_hypotheses;  // H
    int64_t num_joints;      // J
    int64_t output_stride;   // C, channels of the model's output; only the first three are read
};

// Where z comes from if s is not 0: `given`, or else it is drawn by counter.
struct StepNoise {
    const float* given;             // [B, H, J, 3] or null
    uint64_t seed;                  // this and the rest are read if `given` is null
    const int64_t* frame_ids;       // [B], read as unsigned
    const int64_t* hypothesis_ids;  // [H], the low 32 bits
    uint32_t step;
};

// The result has the same bits for any num_threads.
void launch_reverse_step(const float* row,           // [6], p, q, c_x, c_0, c_1, s
                         float clip,                 // of x0; infinity for none
                         const float* sample,        // [B, H, J, 3]
                         const float* model_output,  // [B, H, J, C]
                         const float* x0_last,       // [B, H, J, 3], read where c_1 is not 0; or null
                         const StepNoise& noise,
                         const float* noise_scale,  // [J, 3] or null
                         float* prev_sample,        // [B, H, J, 3]
                         float* x0,                 // [B, H, J, 3]
                         ReverseStepSizes sizes, int num_threads);

}  // namespace diffupose
