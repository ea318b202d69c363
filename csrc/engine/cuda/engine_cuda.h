// The engine on the GPU: the layer program of engine.h over tiles of eight poses.
//
// Three ways through it. `launch_denoise` and `launch_sample_layers` put one kernel per layer on the stream, many
// blocks sharing a layer: for few poses, to be captured in a CUDA graph. `launch_sample_persistent` is one kernel for
// the whole reverse process: a block takes a tile through all layers and steps, its activations stay in shared memory
// and the weights stream past them: for many poses. `launch_sample_clusters` is one kernel, too: a cluster of blocks
// takes a single pose through all layers and steps: for few poses, on GPUs that have clusters.
//
// A tile's memory is planned by the caller: buffers that are not needed at the same time may lie on each other. All
// pointers are on the device; nothing is allocated here and nothing waited for.
#pragma once

#include <cstdint>

namespace diffupose {

constexpr int kTilePoses = 8;
// Channels are padded to this: the depth of one matrix instruction.
constexpr int kStepChannels = 16;
// Joints are padded to 16 or 18, pairs of them to 8 or 9.
constexpr int kCudaMaxJoints = 18;

inline int joint_pairs(int joints) { return joints <= 16 ? 8 : 9; }

// Hopper's kernel pads to 16 or 17 joints.
constexpr int kWgmmaMaxJoints = 17;
// Of its tile's memory the last bytes hold what it reads again and again.
constexpr int kWgmmaStagingBytes = 4 * kWgmmaMaxJoints * 20 * 4;
// Its weights come in rounds of so many steps, and so many steps ahead of their use.
constexpr int kWgmmaRoundSteps = 8, kWgmmaStepsAhead = 3;
inline int wgmma_joints(int joints) { return joints <= 16 ? 16 : 17; }

// A cluster's activations are those of one pose, of so many times eight joints.
inline int cluster_tiles(int joints) { return joints <= 16 ? 2 : 3; }

enum class LayerKind : int32_t { graph_conv, linear, scale_shift, attention_weights, attention_apply };
enum class CudaActivation : int32_t { none, relu, gelu };

// Offsets are bytes in a tile's memory; -1 is none. Weights are packed as fragments.cuh says, the other tensors
// are float32 with channels padded by zeros and joints to 2 pairs.
struct LayerRecord {
    LayerKind kind;
    CudaActivation activation;
    int32_t input_steps;   // channels / 16
    int32_t output_steps;  // channels / 16, of all heads for attention
    int32_t channels;      // what scale_shift averages over
    int32_t num_heads;
    int32_t bias_per_joint, normalize, output_is_float;
    int32_t film;  // silu(x * scale + shift) of the step's parameters behind a product
    float eps;
    int64_t input, output, residual;
    int64_t weights;     // offset of the attention weights
    int64_t parameters;  // index of the first of the step's parameters: scale, and shift behind it
    const void* weight;
    const float *own, *neighbors;  // [2 pairs, channels]
    const float* adjacency;        // [2 pairs, kAdjacencyStride]
    const float* bias;             // [channels] or [2 pairs, channels]
};
constexpr int kAdjacencyStride = 20;

// How activations and weights lie in memory, which is for what runs them.
enum class CudaLayout : int32_t {
    pairs,    // fragments.cuh: launch_denoise, launch_sample_layers, launch_sample_persistent
    wgmma,    // wgmma_layers.cuh: launch_sample_wgmma
    cluster,  // cluster_layers.cuh: launch_sample_clusters
};

struct CudaProgram {
    const LayerRecord* layers;       // on the host
    const LayerRecord* layers_cuda;  // the same, on the device
    int num_layers, num_joints, num_condition_channels, num_output_channels;
    int64_t input, output;  // offsets; the output is float32
    int64_t tile_bytes;
    bool bfloat16;  // else float32
    CudaLayout layout;
};

struct CudaSampleArgs {
    const float* condition;         // [B, J, C]
    const float* coefficients;      // [S, 6]
    const float* noise_scale;       // [S, J, 3] or null
    const float* parameters;        // [S, num_parameters]
    const int64_t* seed;            // [1]
    const int64_t* frame_ids;       // [B]
    const int64_t* hypothesis_ids;  // [H]
    int64_t num_parameters, num_frames, num_hypotheses;
    int num_steps;
    float clip;      // infinity for none
    float* x0_last;  // [B, H, J, 3] where a row has c_1, else null
    float* out;      // [B, H, J, 3], holds x_t on the way
};

struct CudaDenoiseArgs {
    const float* sample;      // [N, J, 3]
    const float* condition;   // [N, J, C]
    const float* parameters;  // [num_parameters]
    int64_t num_poses;
    float* out;  // [N, J, num_output_channels]
};

// workspace: tile_bytes for every tile of eight poses.
void launch_denoise(const CudaProgram& program, const CudaDenoiseArgs& args, unsigned char* workspace, void* stream);
void launch_sample_layers(const CudaProgram& program, const CudaSampleArgs& args, unsigned char* workspace,
                          void* stream);
// bfloat16 only; tile_bytes must fit a block's shared memory.
void launch_sample_persistent(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream);
// The same by Hopper's matrix instructions: for a program that is laid out as wgmma_layers.cuh says, of
// kWgmmaMaxJoints at most, where wgmma_available().
void launch_sample_wgmma(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream);
// For a program that is laid out as cluster_layers.cuh says, of one pose: its tile_bytes and those of cluster_bytes()
// beyond must fit a block's shared memory, and num_clusters the device at the same time.
void launch_sample_clusters(const CudaProgram& program, const CudaSampleArgs& args, int num_clusters, void* stream);
// What a block of a cluster takes of shared memory.
int64_t cluster_bytes(int64_t tile_bytes, int num_layers);
// How many clusters the current device holds at the same time, of so much shared memory; 0 where it has none.
int clusters_available(int num_joints, int64_t shared_bytes);
// Whether the current device is a Hopper GPU, and the extension was built with machine code for sm_90a.
bool wgmma_available();

}  // namespace diffupose
