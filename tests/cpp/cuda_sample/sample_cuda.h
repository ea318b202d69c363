// Two kernels to try the emulation and tools/mutate_barriers.py on: every barrier in them is needed.
#pragma once

#include <cstdint>

namespace diffupose {

// out = a b for a [rows, inner], b [inner, columns].
void launch_tiled_product_cuda(const float* a, const float* b, float* out, int rows, int inner, int columns,
                               void* stream);

// Every row of x [rows, columns] over its length; a block takes several rows, one after the other.
void launch_row_norm_cuda(const float* x, float* out, int rows, int columns, void* stream);

}  // namespace diffupose
