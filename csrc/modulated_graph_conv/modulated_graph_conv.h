// modulated_graph_conv: what follows the product hidden = x [W0 | W1], in one pass over the poses.
//
//   out[n, j] = A[j, j] M[j] own[n, j] + sum_{i != j} A[j, i] M[i] neighbor[n, i] + bias,   hidden = [own | neighbor]
//
// and its gradients. The products themselves are matrix products and stay outside.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"

namespace diffupose {

constexpr int64_t kGraphConvMaxJoints = 64;

struct GraphConvSizes {
    int64_t num_poses;   // N
    int64_t num_joints;  // J, at most kGraphConvMaxJoints
    int64_t channels;    // C_out
};

// An array of either storage.
struct ConstArray {
    const void* data;
    Storage storage;
};
struct Array {
    void* data;
    Storage storage;
};

// A pose's result is the same bit for bit whatever stands beside it and whatever num_threads is.
void launch_modulated_graph_conv_fwd(ConstArray hidden,        // [N, J, 2 C_out]
                                     const float* modulation,  // [J, C_out]
                                     const float* adjacency,   // [J, J]
                                     const float* bias,        // [C_out] or null
                                     Array out,                // [N, J, C_out]
                                     GraphConvSizes sizes, int num_threads);

// The gradients are the same bit for bit whatever num_threads is. `out` of the forward call and grad_out have one
// storage, and so have hidden and grad_hidden.
void launch_modulated_graph_conv_bwd(ConstArray grad_out,      // [N, J, C_out]
                                     ConstArray hidden,        // [N, J, 2 C_out]
                                     const float* modulation,  // [J, C_out]
                                     const float* adjacency,   // [J, J]
                                     void* grad_hidden,        // [N, J, 2 C_out]
                                     float* grad_modulation,   // [J, C_out]
                                     float* grad_adjacency,    // [J, J]
                                     float* grad_bias,         // [C_out]
                                     GraphConvSizes sizes, int num_threads);

}  // namespace diffupose
