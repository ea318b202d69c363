#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <optional>

#include "bind/bind.h"
#include "bind/checks.h"
#include "hypothesis_statistics/hypothesis_statistics.h"
#include "modulated_graph_conv/modulated_graph_conv.h"
#include "philox_normal/philox_normal.h"
#include "reverse_step/reverse_step.h"

namespace py = pybind11;

namespace diffupose {
namespace {

Storage storage(bool bfloat16) { return bfloat16 ? Storage::bfloat16 : Storage::float32; }

// Ten rounds of Philox alone, for its published test vectors.
py::tuple philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const auto [w0, w1, w2, w3] = philox_4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
    return py::make_tuple(w0, w1, w2, w3);
}

void philox_normal(int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t out,
                   int64_t num_frames, int64_t num_hypotheses, int64_t num_elements, int num_threads) {
    const PhiloxNormalSizes sizes = philox_sizes(step, num_frames, num_hypotheses, num_elements);
    check_threads(num_threads);
    const int64_t numel = numel_of({num_frames, num_hypotheses, num_elements});
    if (numel == 0) return;
    launch_philox_normal(static_cast<uint64_t>(seed), pointer<const int64_t>(frame_ids, num_frames, "frame_ids"),
                         pointer<const int64_t>(hypothesis_ids, num_hypotheses, "hypothesis_ids"),
                         static_cast<uint32_t>(step), pointer<float>(out, numel, "out"), sizes, num_threads);
}

void modulated_graph_conv_fwd(uintptr_t hidden, bool hidden_bfloat16, uintptr_t modulation, uintptr_t adjacency,
                              uintptr_t bias, uintptr_t out, bool out_bfloat16, int64_t num_poses, int64_t num_joints,
                              int64_t channels, int num_threads) {
    const GraphConvSizes sizes = graph_conv_sizes(num_poses, num_joints, channels);
    check_threads(num_threads);
    require(hidden_bfloat16 || !out_bfloat16, "out cannot be bfloat16 where hidden is not");
    const int64_t numel = numel_of(sizes);
    launch_modulated_graph_conv_fwd({pointer<const void>(hidden, numel, "hidden"), storage(hidden_bfloat16)},
                                    pointer<const float>(modulation, 1, "modulation"),
                                    pointer<const float>(adjacency, 1, "adjacency"),
                                    reinterpret_cast<const float*>(bias),
                                    {pointer<void>(out, numel, "out"), storage(out_bfloat16)}, sizes, num_threads);
}

void modulated_graph_conv_bwd(uintptr_t grad_out, bool out_bfloat16, uintptr_t hidden, bool hidden_bfloat16,
                              uintptr_t modulation, uintptr_t adjacency, uintptr_t grad_hidden,
                              uintptr_t grad_modulation, uintptr_t grad_adjacency, uintptr_t grad_bias,
                              int64_t num_poses, int64_t num_joints, int64_t channels, int num_threads) {
    const GraphConvSizes sizes = graph_conv_sizes(num_poses, num_joints, channels);
    check_threads(num_threads);
    require(hidden_bfloat16 || !out_bfloat16, "grad_out cannot be bfloat16 where hidden is not");
    const int64_t numel = numel_of(sizes);
    launch_modulated_graph_conv_bwd(
        {pointer<const void>(grad_out, numel, "grad_out"), storage(out_bfloat16)},
        {pointer<const void>(hidden, numel, "hidden"), storage(hidden_bfloat16)},
        pointer<const float>(modulation, 1, "modulation"), pointer<const float>(adjacency, 1, "adjacency"),
        pointer<void>(grad_hidden, numel, "grad_hidden"), pointer<float>(grad_modulation, 1, "grad_modulation"),
        pointer<float>(grad_adjacency, 1, "grad_adjacency"), pointer<float>(grad_bias, 1, "grad_bias"), sizes,
        num_threads);
}

void reverse_step(const std::array<float, 6>& row, std::optional<float> clip, uintptr_t sample, uintptr_t model_output,
                  int64_t output_stride, uintptr_t x0_last, uintptr_t noise, uintptr_t noise_scale, int64_t seed,
                  uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t prev_sample, uintptr_t x0,
                  int64_t num_frames, int64_t num_hypotheses, int64_t num_joints, int num_threads) {
    const ReverseStepSizes sizes = reverse_step_sizes(step, num_frames, num_hypotheses, num_joints, output_stride);
    check_threads(num_threads);
    const int64_t numel = numel_of({num_frames, num_hypotheses, num_joints, 3});
    if (numel == 0) return;
    const bool draws = row[5] != 0.0f && noise == 0;
    launch_reverse_step(row.data(), clip.value_or(std::numeric_limits<float>::infinity()),
                        pointer<const float>(sample, numel, "sample"),
                        pointer<const float>(model_output, numel, "model_output"),
                        pointer<const float>(x0_last, row[4] != 0.0f ? numel : 0, "x0_last"),
                        {reinterpret_cast<const float*>(noise), static_cast<uint64_t>(seed),
                         pointer<const int64_t>(frame_ids, draws ? num_frames : 0, "frame_ids"),
                         pointer<const int64_t>(hypothesis_ids, draws ? num_hypotheses : 0, "hypothesis_ids"),
                         static_cast<uint32_t>(step)},
                        reinterpret_cast<const float*>(noise_scale), pointer<float>(prev_sample, numel, "prev_sample"),
                        pointer<float>(x0, numel, "x0"), sizes, num_threads);
}

void hypothesis_statistics(uintptr_t hypotheses, uintptr_t keypoints_2d, uintptr_t confidence, uintptr_t cameras,
                           bool shared_camera, float weight, float temperature, uintptr_t mean, uintptr_t covariance,
                           uintptr_t weights, uintptr_t weighted_mean, int64_t num_frames, int64_t num_hypotheses,
                           int64_t num_joints, int num_threads) {
    require(num_frames >= 0, "num_frames must not be negative");
    require(num_hypotheses >= 1 && num_joints >= 1, "num_hypotheses and num_joints must be at least 1");
    check_threads(num_threads);
    if (numel_of({num_frames, num_hypotheses, num_joints, 3}) == 0) return;
    const int64_t seen = keypoints_2d == 0 ? 0 : 1;
    const Reprojection reprojection = {reinterpret_cast<const double*>(keypoints_2d),
                                       pointer<const double>(confidence, seen, "confidence"),
                                       pointer<const double>(cameras, seen, "cameras"),
                                       shared_camera,
                                       weight,
                                       temperature};
    launch_hypothesis_statistics(
        pointer<const float>(hypotheses, 1, "hypotheses"), reprojection, pointer<float>(mean, 1, "mean"),
        pointer<float>(covariance, 1, "covariance"), pointer<float>(weights, seen, "weights"),
        pointer<float>(weighted_mean, seen, "weighted_mean"), {num_frames, num_hypotheses, num_joints}, num_threads);
}

}  // namespace

void bind_ops(py::module_& m) {
    m.def("philox_4x32_10", &philox_words, py::arg("counter"), py::arg("key"));
    define_without_gil(m, "philox_normal", &philox_normal, "seed", "frame_ids", "hypothesis_ids", "step", "out",
                       "num_frames", "num_hypotheses", "num_elements", "num_threads");
    define_without_gil(m, "modulated_graph_conv_fwd", &modulated_graph_conv_fwd, "hidden", "hidden_bfloat16",
                       "modulation", "adjacency", "bias", "out", "out_bfloat16", "num_poses", "num_joints", "channels",
                       "num_threads");
    define_without_gil(m, "modulated_graph_conv_bwd", &modulated_graph_conv_bwd, "grad_out", "out_bfloat16", "hidden",
                       "hidden_bfloat16", "modulation", "adjacency", "grad_hidden", "grad_modulation", "grad_adjacency",
                       "grad_bias", "num_poses", "num_joints", "channels", "num_threads");
    define_without_gil(m, "reverse_step", &reverse_step, "row", "clip", "sample", "model_output", "output_stride",
                       "x0_last", "noise", "noise_scale", "seed", "frame_ids", "hypothesis_ids", "step", "prev_sample",
                       "x0", "num_frames", "num_hypotheses", "num_joints", "num_threads");
    define_without_gil(m, "hypothesis_statistics", &hypothesis_statistics, "hypotheses", "keypoints_2d", "confidence",
                       "cameras", "shared_camera", "weight", "temperature", "mean", "covariance", "weights",
                       "weighted_mean", "num_frames", "num_hypotheses", "num_joints", "num_threads");
}

}  // namespace diffupose
