// philox_normal: Gaussian noise that depends on its counter alone, not on batch, chunk or thread.
//
//   key     = (seed & 0xffffffff, seed >> 32)
//   counter = (frame & 0xffffffff, frame >> 32, hypothesis, step << 16 | block),  block = element / 4
//   words (w0, w1) -> z0, z1 and (w2, w3) -> z2, z3 by Box-Muller
#pragma once

#include <cstdint>

#include "philox_normal/philox.h"

namespace diffupose {

// The counter has 16 bits for the block of four elements and 16 for the step.
constexpr int64_t kPhiloxMaxElements = int64_t{4} << 16;
constexpr int64_t kPhiloxMaxStep = 0xffff;

struct PhiloxNormalSizes {
    int64_t num_frames;      // B
    int64_t num_hypotheses;  // H
    int64_t num_elements;    // at most kPhiloxMaxElements
};

// The noise of one hypothesis of one frame.
void philox_normal_row(PhiloxKey key, uint64_t frame_id, uint32_t hypothesis_id, uint32_t step, int64_t num_elements,
                       float* out);

// The result has the same bits for any num_threads.
void launch_philox_normal(uint64_t seed,
                          const int64_t* frame_ids,       // [B], read as unsigned
                          const int64_t* hypothesis_ids,  // [H], the low 32 bits
                          uint32_t step,                  // at most kPhiloxMaxStep
                          float* out,                     // [B, H, num_elements]
                          PhiloxNormalSizes sizes, int num_threads);

}  // namespace diffupose
