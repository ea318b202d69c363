// A denoiser as a list of layers over buffers. `denoise` runs the layers once, `sample` once for every step of the
// reverse process.
//
// Poses are cut into tiles of a few. A thread takes a tile through all layers and all steps, and its activations stay
// in its caches. Poses do not depend on each other, so threads do not wait for each other. The exception is a call with
// fewer poses than threads: then all threads share the columns of every layer. Within one instruction set the bits of a
// pose do not depend on its tile or on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "common/aligned.h"
#include "engine/cpu/kernels.h"

namespace diffupose {

// Matrices are row-major float32; the engine copies what it is given. `input`, `output` and `residual` are buffers;
// residual -1 is none.
struct GraphConvLayer {
    int input, output, residual;
    Activation activation;
    int64_t c_in, c_out;
    const float* weight;     // [c_in, 2 c_out]: own | neighbours
    const float* own;        // [J, c_out]
    const float* neighbors;  // [J, c_out]
    const float* adjacency;  // [J, J], diagonal 0
    const float* bias;       // [c_out]
};

struct LinearLayer {
    int input, output, residual;
    int64_t c_in, c_out;
    const float* weight;  // [c_in, c_out]
    const float* bias;    // [c_out], or [J, c_out]
    bool bias_per_joint;
};

// Scale and shift come from the step's parameters: `channels` numbers each, padded, from `offset` on.
struct ScaleShiftLayer {
    int input, output;
    bool normalize;
    float eps;
    int64_t channels, offset;
};

struct AttentionLayer {
    int input, output;
    int64_t num_heads, channels;  // of one head
};

struct Noise {
    uint64_t seed;
    const int64_t* frame_ids;       // [B]
    const int64_t* hypothesis_ids;  // [H]
};

struct SampleArgs {
    const float* condition;     // [B, J, C]
    const float* coefficients;  // [S, 6]: p, q, c_x, c_0, c_1, s
    const float* noise_scale;   // [S, J, 3] or null
    const float* parameters;    // [S, num_parameters]
    Noise noise;
    float clip;  // infinity for none
    int64_t num_frames, num_hypotheses, num_steps;
    int num_threads;
    float* out;  // [B, H, J, 3]
};

struct DenoiseArgs {
    const float* sample;      // [N, J, 3]
    const float* condition;   // [N, J, C]
    const float* parameters;  // [num_parameters]
    int64_t num_poses;
    int num_threads;
    float* out;  // [N, J, output channels]
};

class Engine {
   public:
    // widths: channels of every buffer; buffer 0 is the input (x_t beside the condition), the last one the output.
    Engine(int64_t num_joints, std::vector<int64_t> widths, bool bfloat16);

    void add(const GraphConvLayer& layer);
    void add(const LinearLayer& layer);
    void add(const ScaleShiftLayer& layer);
    void add(const AttentionLayer& layer);

    Isa isa() const { return isa_; }
    int64_t num_condition_channels() const { return widths_.front() - 3; }
    // Channels including the padding, as in the step's parameters.
    int64_t padded(int64_t channels) const;
    int64_t num_parameters() const { return num_parameters_; }
    int64_t weight_bytes() const { return weight_bytes_; }

    // Return false if `interrupted` returned true. It is called now and then on the caller's thread.
    bool sample(const SampleArgs& args, const std::function<bool()>& interrupted) const;
    bool denoise(const DenoiseArgs& args, const std::function<bool()>& interrupted) const;

   private:
    struct Packed {
        std::variant<GraphConvArgs, LinearArgs, ScaleShiftArgs, AttentionArgs> args;
        int input, output, residual;
        int64_t offset;  // of the parameters
    };
    struct Tile;
    struct Team;

    int64_t check_buffer(int buffer, int64_t channels, const char* name) const;
    int64_t check_output(int output, int residual, int64_t channels) const;
    const float* keep(const float* values, int64_t rows, int64_t columns, int64_t stride);
    const void* keep_packed(const float* weight, int64_t k, int64_t columns, bool interleaved);
    void run_layers(const Tile& tile, int64_t poses, const float* parameters, Team& team, int part, int parts,
                    void* scratch) const;
    int64_t scratch_bytes(int64_t poses) const;
    template <typename Work>
    bool run(int64_t num_poses, int num_threads, bool with_history, const std::function<bool()>& interrupted,
             const Work& work) const;

    int64_t joints_;
    std::vector<int64_t> widths_;
    bool bfloat16_;
    Isa isa_;
    const Kernels& kernels_;
    std::vector<Packed> layers_;
    std::vector<AlignedBytes> memory_;
    int64_t num_parameters_ = 0, weight_bytes_ = 0, largest_k_ = 1, largest_head_ = 1;
};

}  // namespace diffupose
