#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <optional>
#include <string>

#include "bind/bind.h"
#include "bind/checks.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"
#include "modulated_graph_conv/modulated_graph_conv_cuda.h"
#include "philox_normal/philox_normal_cuda.h"
#include "reverse_step/reverse_step_cuda.h"

namespace py = pybind11;

namespace diffupose {
namespace {

// PyTorch's names.
Storage storage(const std::string& dtype) {
    if (dtype == "float32") return Storage::float32;
    if (dtype == "float16") return Storage::float16;
    if (dtype == "bfloat16") return Storage::bfloat16;
    throw std::invalid_argument("a dtype must be float32, float16 or bfloat16, got " + dtype);
}

void* handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void philox_normal(int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t out,
                   int64_t num_frames, int64_t num_hypotheses, int64_t num_elements, uintptr_t stream) {
    const PhiloxNormalSizes sizes = philox_sizes(step, num_frames, num_hypotheses, num_elements);
    const int64_t numel = numel_of({num_frames, num_hypotheses, num_elements});
    if (numel == 0) return;
    launch_philox_normal_cuda(static_cast<uint64_t>(seed), pointer<const int64_t>(frame_ids, num_frames, "frame_ids"),
                              pointer<const int64_t>(hypothesis_ids, num_hypotheses, "hypothesis_ids"),
                              static_cast<uint32_t>(step), pointer<float>(out, numel, "out"), sizes, handle(stream));
}

void modulated_graph_conv_fwd(uintptr_t hidden, const std::string& dtype, uintptr_t modulation, uintptr_t adjacency,
                              uintptr_t bias, uintptr_t out, const std::string& out_dtype, int64_t num_poses,
                              int64_t num_joints, int64_t channels, uintptr_t stream) {
    const GraphConvSizes sizes = graph_conv_sizes(num_poses, num_joints, channels);
    const int64_t numel = numel_of(sizes);
    launch_modulated_graph_conv_fwd_cuda({pointer<const void>(hidden, numel, "hidden"), storage(dtype)},
                                         pointer<const float>(modulation, 1, "modulation"),
                                         pointer<const float>(adjacency, 1, "adjacency"),
                                         reinterpret_cast<const float*>(bias),
                                         {pointer<void>(out, numel, "out"), storage(out_dtype)}, sizes, handle(stream));
}

int64_t modulated_graph_conv_bwd_workspace(int64_t num_poses, int64_t num_joints, int64_t channels) {
    return graph_conv_bwd_workspace(graph_conv_sizes(num_poses, num_joints, channels));
}

void modulated_graph_conv_bwd(uintptr_t grad_out, const std::string& out_dtype, uintptr_t hidden,
                              const std::string& dtype, uintptr_t modulation, uintptr_t adjacency,
                              uintptr_t grad_hidden, uintptr_t grad_modulation, uintptr_t grad_adjacency,
                              uintptr_t grad_bias, uintptr_t workspace, int64_t num_poses, int64_t num_joints,
                              int64_t channels, uintptr_t stream) {
    const GraphConvSizes sizes = graph_conv_sizes(num_poses, num_joints, channels);
    const int64_t numel = numel_of(sizes);
    launch_modulated_graph_conv_bwd_cuda(
        {pointer<const void>(grad_out, numel, "grad_out"), storage(out_dtype)},
        {pointer<const void>(hidden, numel, "hidden"), storage(dtype)},
        pointer<const float>(modulation, 1, "modulation"), pointer<const float>(adjacency, 1, "adjacency"),
        pointer<void>(grad_hidden, numel, "grad_hidden"), pointer<float>(grad_modulation, 1, "grad_modulation"),
        pointer<float>(grad_adjacency, 1, "grad_adjacency"), pointer<float>(grad_bias, 1, "grad_bias"),
        pointer<float>(workspace, 1, "workspace"), sizes, handle(stream));
}

// The row and its number by value, or both on the device: `table` and `index`.
void reverse_step(const std::optional<std::array<float, 6>>& row, int64_t step, uintptr_t table, uintptr_t index,
                  std::optional<float> clip, const std::string& dtype, const std::string& output_dtype,
                  uintptr_t sample, uintptr_t model_output, int64_t output_stride, uintptr_t x0_last, uintptr_t noise,
                  uintptr_t noise_scale, int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids,
                  uintptr_t prev_sample, uintptr_t x0, int64_t num_frames, int64_t num_hypotheses, int64_t num_joints,
                  uintptr_t stream) {
    const ReverseStepSizes sizes = reverse_step_sizes(step, num_frames, num_hypotheses, num_joints, output_stride);
    require(num_hypotheses < (int64_t{1} << 31), "num_hypotheses must lie below 2^31");
    const int64_t numel = numel_of({num_frames, num_hypotheses, num_joints, 3});
    if (numel == 0) return;
    StepChoice choice = {};
    if (row) {
        const auto& [p, q, c_x, c_0, c_1, s] = *row;
        choice = {nullptr, nullptr, {p, q, c_x, c_0, c_1, s}, step};
    } else {
        choice.table = pointer<const float>(table, 6, "table");
        choice.index = pointer<const int64_t>(index, 1, "index");
    }
    // A row on the device may draw noise. It may need x0_last as well, and gives NaN without.
    const bool reads_last = row && (*row)[4] != 0.0f, draws = noise == 0 && (!row || (*row)[5] != 0.0f);
    ReverseStepTensors tensors = {};
    tensors.state = storage(dtype), tensors.output = storage(output_dtype);
    tensors.sample = pointer<const void>(sample, numel, "sample");
    tensors.model_output = pointer<const void>(model_output, numel, "model_output");
    tensors.x0_last = pointer<const void>(x0_last, reads_last ? numel : 0, "x0_last");
    tensors.given_noise = reinterpret_cast<const float*>(noise);
    tensors.noise_scale = reinterpret_cast<const float*>(noise_scale);
    tensors.prev_sample = pointer<void>(prev_sample, numel, "prev_sample");
    tensors.x0 = reinterpret_cast<void*>(x0);
    tensors.seed = static_cast<uint64_t>(seed);
    tensors.frame_ids = pointer<const int64_t>(frame_ids, draws ? num_frames : 0, "frame_ids");
    tensors.hypothesis_ids = pointer<const int64_t>(hypothesis_ids, draws ? num_hypotheses : 0, "hypothesis_ids");
    launch_reverse_step_cuda(choice, clip.value_or(std::numeric_limits<float>::infinity()), tensors, sizes,
                             handle(stream));
}

void hypothesis_statistics(uintptr_t hypotheses, uintptr_t mean, uintptr_t covariance, int64_t num_frames,
                           int64_t num_hypotheses, int64_t num_joints, uintptr_t stream) {
    require(num_frames >= 0 && num_frames < (int64_t{1} << 31), "num_frames must lie in [0, 2^31)");
    require(num_hypotheses >= 1, "num_hypotheses must be at least 1");
    require(num_joints >= 1 && num_joints <= kCudaStatisticsMaxJoints, "num_joints must lie in [1, 64]");
    if (numel_of({num_frames, num_hypotheses, num_joints, 3}) == 0) return;
    launch_hypothesis_statistics_cuda(pointer<const float>(hypotheses, 1, "hypotheses"),
                                      pointer<float>(mean, 1, "mean"), pointer<float>(covariance, 1, "covariance"),
                                      {num_frames, num_hypotheses, num_joints}, handle(stream));
}

}  // namespace

void bind_ops_cuda(py::module_& m) {
    define_without_gil(m, "philox_normal", &philox_normal, "seed", "frame_ids", "hypothesis_ids", "step", "out",
                       "num_frames", "num_hypotheses", "num_elements", "stream");
    define_without_gil(m, "modulated_graph_conv_fwd", &modulated_graph_conv_fwd, "hidden", "dtype", "modulation",
                       "adjacency", "bias", "out", "out_dtype", "num_poses", "num_joints", "channels", "stream");
    define(m, "modulated_graph_conv_bwd_workspace", &modulated_graph_conv_bwd_workspace, "num_poses", "num_joints",
           "channels");
    define_without_gil(m, "modulated_graph_conv_bwd", &modulated_graph_conv_bwd, "grad_out", "out_dtype", "hidden",
                       "dtype", "modulation", "adjacency", "grad_hidden", "grad_modulation", "grad_adjacency",
                       "grad_bias", "workspace", "num_poses", "num_joints", "channels", "stream");
    define_without_gil(m, "reverse_step", &reverse_step, "row", "step", "table", "index", "clip", "dtype",
                       "output_dtype", "sample", "model_output", "output_stride", "x0_last", "noise", "noise_scale",
                       "seed", "frame_ids", "hypothesis_ids", "prev_sample", "x0", "num_frames", "num_hypotheses",
                       "num_joints", "stream");
    define_without_gil(m, "hypothesis_statistics", &hypothesis_statistics, "hypotheses", "mean", "covariance",
                       "num_frames", "num_hypotheses", "num_joints", "stream");
}

}  // namespace diffupose
