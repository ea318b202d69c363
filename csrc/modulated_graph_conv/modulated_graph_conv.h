// modulated_graph_conv: everything after the product hidden = x [W0 | W1], in one pass over the poses.
//
//   out[n, j] = A[j, j] M[j] own[n, j] + sum_{i != j} A[j, i] M[i] neighbor[n, i] + bias,   hidden = [own | neighbor]
//
// and its gradients. PyTorch computes the product.
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

// An array and how its elements are stored.
struct ConstArray {
    const void* data;
    Storage storage;
};
struct Array {
    void* data;
    Storage storage;
};

// A pose's result has the same bits for any num_threads and any batch.
void launch_modulated_graph_conv_fwd(ConstArray hidden,        // [N, J, 2 C_out]
                                     const float* modulation,  // [J, C_out]
                                     const float* adjacency,   // [J, J]
                                     const float* bias,        // [C_out] or null
                                     Array out,                // [N, J, C_out]
                                     GraphConvSizes sizes, int num_threads);

// The gradients have the same bits for any num_threads. grad_out has the storage of the forward call's `out`, and
// grad_hidden that of hidden.
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
