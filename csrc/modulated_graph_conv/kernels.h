// The work of one thread on a range of poses; one implementation for each instruction set.
#pragma once

#include <cstdint>

#include "modulated_graph_conv/modulated_graph_conv.h"

namespace diffupose {

// Parameters in rows of C_padded, the next multiple of the vector's lanes; the padding is 0.
struct GraphConvParameters {
    const float* own;         // [J, C_padded], A[j, j] M[j]
    const float* modulation;  // [J, C_padded]
    const float* bias;        // [C_padded]
    const float* neighbors;   // [J, J], A with a diagonal of 0; transposed for the gradients
    int64_t padded;
};

// Sums over the poses of a part; kernels add to them.
struct GraphConvSums {
    float* own;        // [J, C_padded], of grad_out times own
    float* neighbor;   // [J, C_padded], of neighbor times its gradient through the adjacency
    float* bias;       // [C_padded], of grad_out
    float* adjacency;  // [J, J, lanes], not yet summed over the lanes
};

struct PoseRange {
    int64_t begin, end;
};

struct GraphConvKernels {
    int lanes;
    // `scratch` holds J (2 C_padded + lanes) floats; the forward pass needs J lanes only.
    void (*forward)(const GraphConvParameters&, ConstArray hidden, Array out, GraphConvSizes, PoseRange,
                    float* scratch);
    void (*backward)(const GraphConvParameters&, ConstArray grad_out, ConstArray hidden, void* grad_hidden,
                     const GraphConvSums&, GraphConvSizes, PoseRange, float* scratch);
};

}  // namespace diffupose
