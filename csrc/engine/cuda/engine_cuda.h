// The engine on the GPU: the layer program of engine.h over pose tiles of eight poses.
//
// There are five ways to sample. The caller chooses one by its launcher; by layers, the program's precision decides
// between the first two:
//
//   mode          layout    launcher                    product     one kernel takes            for
//   `layers`      pairs     launch_sample_layers        mma         one layer, all pose tiles   few poses
//   `layers`      pairs     launch_sample_layers        float32     one layer, all pose tiles   float32 programs
//   `persistent`  pairs     launch_sample_persistent    mma         all layers and steps        many poses
//   `persistent`  wgmma     launch_sample_wgmma         wgmma       all layers and steps        many poses, on Hopper
//   `cluster`     cluster   launch_sample_clusters      mma         all layers and steps        few poses, on clusters
//
// By layers, many blocks share a layer, and a CUDA graph holds the kernels of all steps; `launch_denoise` runs the
// layers once. In a persistent kernel a block takes a pose tile through all layers and steps; its activations stay in
// shared memory, and the weights stream past them. In the cluster kernel a cluster of blocks takes a single pose.
//
// The caller plans the memory of a pose tile: buffers that are not needed at the same time may overlap. All pointers
// are on the device. Nothing is allocated here, and nothing waits.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/host_device.h"

namespace diffupose {

constexpr int kTilePoses = 8;
// Channels are padded to whole blocks of this many, which is the depth of one matrix instruction.
constexpr int kChannelBlock = 16;
// Joints are padded to 16 or 18, pairs of them to 8 or 9.
constexpr int kCudaMaxJoints = 18;

inline int joint_pairs(int joints) { return joints <= 16 ? 8 : 9; }

// Hopper's kernel pads to 16 or 17 joints.
constexpr int kWgmmaMaxJoints = 17;
// The last bytes of its pose tile's memory hold the adjacencies that it reads again and again.
constexpr int kWgmmaStagingBytes = 4 * kWgmmaMaxJoints * 20 * 4;
// It loads weights in rounds of this many channel blocks, and this many channel blocks ahead of their use.
constexpr int kWgmmaRoundBlocks = 8, kWgmmaBlocksAhead = 3;
inline int wgmma_joints(int joints) { return joints <= 16 ? 16 : 17; }

// Joint groups of eight joints, in which the activations of a cluster's pose lie.
inline int cluster_joint_groups(int joints) { return joints <= 16 ? 2 : 3; }

enum class LayerKind : int32_t { graph_conv, linear, scale_shift, attention_weights, attention_apply };

// Offsets are bytes in the memory of a pose tile; -1 is none. The header of the layout says how weights are packed. The
// other tensors are float32, padded by zeros to whole channel blocks and to 2 pairs joints.
struct LayerRecord {
    LayerKind kind;
    Activation activation;
    int32_t input_blocks;   // channel blocks: channels / 16, rounded up
    int32_t output_blocks;  // the same; of all heads for attention
    int32_t channels;       // over which scale_shift averages
    int32_t num_heads;
    int32_t bias_per_joint, normalize, output_is_float;
    int32_t film;  // a product's result becomes silu(x * scale + shift), by the step's parameters
    float eps;
    int64_t input, output, residual;
    int64_t weights;     // offset of the attention weights
    int64_t parameters;  // index of scale among the step's parameters; shift follows it
    const void* weight;
    const float *own, *neighbors;  // [2 pairs, channels]
    const float* adjacency;        // [2 pairs, kAdjacencyStride]
    const float* bias;             // [channels] or [2 pairs, channels]
};
constexpr int kAdjacencyStride = 20;

DIFFUPOSE_HOST_DEVICE inline bool is_product(const LayerRecord& layer) {
    return layer.kind == LayerKind::graph_conv || layer.kind == LayerKind::linear;
}

// How activations and weights lie in memory. Each layout has its own launchers.
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

// workspace: tile_bytes for every pose tile.
void launch_denoise(const CudaProgram& program, const CudaDenoiseArgs& args, unsigned char* workspace, void* stream);
void launch_sample_layers(const CudaProgram& program, const CudaSampleArgs& args, unsigned char* workspace,
                          void* stream);
// bfloat16 only; tile_bytes must fit the shared memory of a block.
void launch_sample_persistent(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream);
// The same by Hopper's matrix instructions, where wgmma_available(): for a program in the layout of wgmma_layers.cuh
// with at most kWgmmaMaxJoints joints.
void launch_sample_wgmma(const CudaProgram& program, const CudaSampleArgs& args, int num_blocks, void* stream);
// For a program in the layout of cluster_layers.cuh, whose pose tile is one pose. cluster_bytes() must fit the shared
// memory of a block. The device must hold num_clusters clusters at the same time.
void launch_sample_clusters(const CudaProgram& program, const CudaSampleArgs& args, int num_clusters, void* stream);
// Shared memory that a block of a cluster takes.
int64_t cluster_bytes(int64_t tile_bytes, int num_layers);
// How many clusters whose blocks take `shared_bytes` the current device holds at the same time; 0 without clusters.
int clusters_available(int num_joints, int64_t shared_bytes);
// Whether the current device is a Hopper GPU, and the extension was built with machine code for sm_90a.
bool wgmma_available();

}  // namespace diffupose
