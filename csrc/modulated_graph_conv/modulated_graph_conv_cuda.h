// modulated_graph_conv on the GPU; see modulated_graph_conv.h. All pointers are on the device. float16 and bfloat16 are
// storage: everything is computed in float32.
#pragma once

#include "modulated_graph_conv/modulated_graph_conv.h"

namespace diffupose {

// The storage of out is that of hidden, or float32. A pose's result is the same bit for bit whatever stands beside it.
void launch_modulated_graph_conv_fwd_cuda(ConstArray hidden,        // [N, J, 2 C_out]
                                          const float* modulation,  // [J, C_out]
                                          const float* adjacency,   // [J, J]
                                          const float* bias,        // [C_out] or null
                                          Array out,                // [N, J, C_out]
                                          GraphConvSizes sizes, void* stream);

// Floats that the backward pass needs beside its results.
int64_t graph_conv_bwd_workspace(GraphConvSizes sizes);

// The gradients are the same bit for bit at every call and on every GPU of one kind: sums are taken in parts that
// depend on the sizes alone, and the parts are added in their order.
void launch_modulated_graph_conv_bwd_cuda(ConstArray grad_out,      // [N, J, C_out], in the storage of out
                                          ConstArray hidden,        // [N, J, 2 C_out]
                                          const float* modulation,  // [J, C_out]
                                          const float* adjacency,   // [J, J]
                                          void* grad_hidden,        // [N, J, 2 C_out], in the storage of hidden
                                          float* grad_modulation,   // [J, C_out]
                                          float* grad_adjacency,    // [J, J]
                                          float* grad_bias,         // [C_out]
                                          float* workspace, GraphConvSizes sizes, void* stream);

}  // namespace diffupose
