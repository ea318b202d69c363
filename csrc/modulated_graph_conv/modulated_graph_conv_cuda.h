// modulated_graph_conv on the GPU; see modulated_graph_conv.h. All pointers are on the device. float16 and bfloat16 are
// storage only: all arithmetic is in float32.
#pragma once

#include "modulated_graph_conv/modulated_graph_conv.h"

namespace diffupose {

// The storage of out is that of hidden, or float32. A pose's result has the same bits in any batch.
void launch_modulated_graph_conv_fwd_cuda(ConstArray hidden,        // [N, J, 2 C_out]
                                          const float* modulation,  // [J, C_out]
                                          const float* adjacency,   // [J, J]
                                          const float* bias,        // [C_out] or null
                                          Array out,                // [N, J, C_out]
                                          GraphConvSizes sizes, void* stream);

// The size of the backward pass's workspace, in floats.
int64_t graph_conv_bwd_workspace(GraphConvSizes sizes);

// The gradients have the same bits at every call and on every GPU of one kind: the parts of the sums depend on the
// sizes alone, and are added in order.
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
