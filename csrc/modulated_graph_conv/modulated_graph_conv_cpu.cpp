#include <algorithm>
#include <vector>

#include "common/aligned.h"
#include "common/parallel.h"
#include "common/per_isa.h"
#include "modulated_graph_conv/kernels.h"
#include "modulated_graph_conv/modulated_graph_conv.h"

namespace diffupose {

DIFFUPOSE_PER_ISA(GraphConvKernels, kGraphConv)

namespace {

// With less work, waking a second thread (microseconds) costs more than it saves.
constexpr int64_t kMinElementsPerThread = 1 << 14;
// Sums over poses are taken in parts that depend on the number of poses alone: the result is the same for any number of
// threads. There are enough parts to balance threads, and each has enough poses to be worth its memory.
constexpr int64_t kMaxParts = 32, kMinPosesPerPart = 16;

float* floats(const AlignedBytes& bytes) { return reinterpret_cast<float*>(bytes.get()); }

int useful_threads(GraphConvSizes sizes, int64_t pieces, int num_threads) {
    const int64_t elements = sizes.num_poses * sizes.num_joints * sizes.channels;
    const int64_t useful = std::min(pieces, std::max<int64_t>(1, elements / kMinElementsPerThread));
    return static_cast<int>(std::min<int64_t>(num_threads, useful));
}

// The parameters as the kernels take them.
class Parameters {
   public:
    Parameters(const GraphConvKernels& kernels, const float* modulation, const float* adjacency, const float* bias,
               bool transposed, GraphConvSizes sizes) {
        const int64_t joints = sizes.num_joints, channels = sizes.channels;
        padded_ = (channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
        memory_ = aligned_bytes(4 * ((2 * joints + 1) * padded_ + joints * joints));
        float* own = floats(memory_);
        float* scaled = own + joints * padded_;
        float* shift = scaled + joints * padded_;
        float* neighbors = shift + padded_;
        for (int64_t j = 0; j < joints; ++j) {
            for (int64_t c = 0; c < channels; ++c) {
                scaled[j * padded_ + c] = modulation[j * channels + c];
                own[j * padded_ + c] = adjacency[j * joints + j] * modulation[j * channels + c];
            }
            for (int64_t i = 0; i < joints; ++i) {
                const float value = adjacency[j * joints + i];
                if (i != j) neighbors[transposed ? i * joints + j : j * joints + i] = value;
            }
        }
        if (bias != nullptr) std::copy_n(bias, channels, shift);
        view_ = {own, scaled, shift, neighbors, padded_};
    }
    const GraphConvParameters& view() const { return view_; }
    int64_t padded() const { return padded_; }

   private:
    AlignedBytes memory_;
    int64_t padded_;
    GraphConvParameters view_;
};

}  // namespace

void launch_modulated_graph_conv_fwd(ConstArray hidden, const float* modulation, const float* adjacency,
                                     const float* bias, Array out, GraphConvSizes sizes, int num_threads) {
    const GraphConvKernels& kernels = DIFFUPOSE_TAKE(active_isa(), kGraphConv);
    const Parameters parameters(kernels, modulation, adjacency, bias, false, sizes);
    const int threads = useful_threads(sizes, sizes.num_poses, num_threads);
    const int64_t scratch = sizes.num_joints * kernels.lanes;
    const AlignedBytes memory = aligned_bytes(4 * threads * scratch);
    parallel(threads, [&](int index, int count) {
        const PoseRange range = {sizes.num_poses * index / count, sizes.num_poses * (index + 1) / count};
        kernels.forward(parameters.view(), hidden, out, sizes, range, floats(memory) + index * scratch);
    });
}

void launch_modulated_graph_conv_bwd(ConstArray grad_out, ConstArray hidden, const float* modulation,
                                     const float* adjacency, void* grad_hidden, float* grad_modulation,
                                     float* grad_adjacency, float* grad_bias, GraphConvSizes sizes, int num_threads) {
    const GraphConvKernels& kernels = DIFFUPOSE_TAKE(active_isa(), kGraphConv);
    const Parameters parameters(kernels, modulation, adjacency, nullptr, true, sizes);
    const int64_t joints = sizes.num_joints, channels = sizes.channels, padded = parameters.padded();
    const int64_t parts = std::clamp<int64_t>(sizes.num_poses / kMinPosesPerPart, 1, kMaxParts);
    const int threads = useful_threads(sizes, parts, num_threads);
    const int64_t scratch = joints * (2 * padded + kernels.lanes);
    const int64_t part_size = (2 * joints + 1) * padded + joints * joints * kernels.lanes;
    const AlignedBytes memory = aligned_bytes(4 * (threads * scratch + parts * part_size));
    float* sums = floats(memory) + threads * scratch;
    parallel(threads, [&](int index, int count) {
        for (int64_t part = parts * index / count; part < parts * (index + 1) / count; ++part) {
            float* own = sums + part * part_size;
            float* neighbor = own + joints * padded;
            float* bias = neighbor + joints * padded;
            const PoseRange range = {sizes.num_poses * part / parts, sizes.num_poses * (part + 1) / parts};
            kernels.backward(parameters.view(), grad_out, hidden, grad_hidden, {own, neighbor, bias, bias + padded},
                             sizes, range, floats(memory) + index * scratch);
        }
    });
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < part_size; ++i) sums[i] += sums[part * part_size + i];
    }
    const float* own = sums;
    const float* neighbor = own + joints * padded;
    const float* bias = neighbor + joints * padded;
    const float* outer = bias + padded;
    for (int64_t j = 0; j < joints; ++j) {
        double diagonal = 0.0;
        for (int64_t c = 0; c < channels; ++c) {
            const float product = own[j * padded + c];
            grad_modulation[j * channels + c] = adjacency[j * joints + j] * product + neighbor[j * padded + c];
            diagonal += static_cast<double>(modulation[j * channels + c]) * static_cast<double>(product);
        }
        for (int64_t i = 0; i < joints; ++i) {
            double total = 0.0;
            for (int lane = 0; lane < kernels.lanes; ++lane) {
                total += static_cast<double>(outer[(j * joints + i) * kernels.lanes + lane]);
            }
            grad_adjacency[j * joints + i] = static_cast<float>(i == j ? diagonal : total);
        }
    }
    std::copy_n(bias, channels, grad_bias);
}

}  // namespace diffupose
