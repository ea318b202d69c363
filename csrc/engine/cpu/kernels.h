// What the engine needs of an instruction set: the layers over a tile of poses, and the packing of their weights.
//
// A tile is poses x joints rows of float32 activations; the stride of the buffer is the length of a row. Several
// threads can share a layer: each takes its part of columns, rows or heads, and computes every element as a single
// thread would.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/isa.h"

namespace diffupose {

// A weight in panels of `2 * lanes` columns. Float32 panels are [K][2 lanes]. Bfloat16 panels are [K / 2][2 lanes][2]
// where the processor multiplies bfloat16; elsewhere their values are kept in float32.
struct PackedWeight {
    const void* panels;
    int64_t k;           // rows of the weight, C_in
    int64_t num_panels;  // for a graph convolution each holds `lanes` columns: own weights left, neighbours' right
};

struct Part {
    int index, count;
};

struct Rows {
    int64_t poses, joints;
};

// y = activation(bias + own * (x W0) + offdiag(A) (neighbors * (x W1))) + residual
struct GraphConvArgs {
    PackedWeight weight;
    const float* own;        // [J, C_padded], diag(A) * modulation, BatchNorm's factor in it
    const float* neighbors;  // [J, C_padded], modulation, BatchNorm's factor in it
    const float* bias;       // [C_padded]
    const float* adjacency;  // [J, J], diagonal 0
    Activation activation;
    Rows rows;
    const float* x;
    int64_t x_stride;
    const float* residual;  // or null; may be y
    float* y;
    int64_t y_stride;  // also the padded width of the parameters
};

// y = x W + bias + residual
struct LinearArgs {
    PackedWeight weight;
    const float* bias;    // [C_padded], or [J, C_padded]
    int64_t bias_stride;  // 0 for the former
    Rows rows;
    const float* x;
    int64_t x_stride;
    const float* residual;  // or null; may be y
    float* y;
    int64_t y_stride;
};

// y = normalised(x) * scale + shift (LayerNorm with FiLM folded into it), or y = silu(x * scale + shift)
struct ScaleShiftArgs {
    bool normalize;
    float eps;
    int64_t channels;
    Rows rows;
    const float* scale;  // [channels], padded
    const float* shift;
    const float* x;
    float* y;
    int64_t stride;  // of both
};

// y[h] = softmax(q[h] k[h]^T) v[h], for each head h
struct AttentionArgs {
    int64_t num_heads, channels;  // of one head
    Rows rows;
    const float* x;  // queries, keys and values of all heads, in this order
    int64_t x_stride;
    float* y;
    int64_t y_stride;
};

struct Kernels {
    int lanes;
    bool multiplies_bfloat16;

    // Bytes of a packed weight; columns counted as in the matrix that is packed.
    int64_t (*packed_bytes)(int64_t k, int64_t columns, bool bfloat16);
    // weight [k, columns], row-major. `interleaved` packs [W0 | W1] for a graph convolution: columns is 2 C_out.
    void (*pack)(const float* weight, int64_t k, int64_t columns, bool interleaved, bool bfloat16, void* panels);

    // Bytes of scratch memory that one thread needs for any of the layers.
    int64_t (*scratch_bytes)(Rows rows, int64_t largest_k, int64_t largest_head);
    void (*graph_conv)(const GraphConvArgs&, bool bfloat16, Part, void* scratch);
    void (*linear)(const LinearArgs&, bool bfloat16, Part, void* scratch);
    void (*scale_shift)(const ScaleShiftArgs&, Part);
    void (*attention)(const AttentionArgs&, Part, void* scratch);

    // Runs a loop that touches registers only, and returns its floating-point operations. `sum` keeps the compiler from
    // removing the loop.
    double (*peak_loop)(int64_t iterations, bool bfloat16, float* sum);
};

const Kernels& kernels_of(Isa isa);

}  // namespace diffupose
