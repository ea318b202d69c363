// reverse_step on the GPU; see reverse_step.h.
#pragma once

#include "common/bfloat16.h"
#include "reverse_step/reverse_step.h"
#include "reverse_step/reverse_step_element.h"

namespace diffupose {

// The row of the step table. A row on the device is read when the kernel runs, so that one captured graph serves all
// steps.
struct StepChoice {
    const float* table;    // [S, 6] on the device; or null: then `row` and `step` are used
    const int64_t* index;  // [1] on the device, with `table`
    StepRow row;
    int64_t step;
};

struct ReverseStepTensors {
    Storage state;                  // of sample, x0_last, prev_sample and x0
    Storage output;                 // of model_output: that of the state; any, if the state is float32
    const void* sample;             // [B, H, J, 3]
    const void* model_output;       // [B, H, J, C]
    const void* x0_last;            // [B, H, J, 3], read where c_1 is not 0; or null
    const float* given_noise;       // [B, H, J, 3]; or null: drawn by counter if s is not 0
    const float* noise_scale;       // [S, J, 3] or null
    void* prev_sample;              // [B, H, J, 3], may be sample
    void* x0;                       // [B, H, J, 3], may be x0_last; or null
    uint64_t seed;                  // of drawn noise, and so are the ids
    const int64_t* frame_ids;       // [B]
    const int64_t* hypothesis_ids;  // [H]
};

// All pointers are on the device; num_hypotheses is below 2^31. A pose's result has the same bits in any batch.
void launch_reverse_step_cuda(const StepChoice& choice, float clip, const ReverseStepTensors& tensors,
                              ReverseStepSizes sizes, void* stream);

}  // namespace diffupose
