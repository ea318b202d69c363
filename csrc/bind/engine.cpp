// The C++ engine's binding.
#include "engine/cpu/engine.h"

#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/checks.h"
#include "philox_normal/philox_normal.h"

namespace py = pybind11;

namespace diffupose {
namespace {

template <typename T>
const T* address(uintptr_t value, const char* name) {
    return pointer<const T>(value, 1, name);
}

// Whether a signal came whose handler raised (Ctrl-C); called on the thread that called from Python.
bool interrupted() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// Raises what the handler raised.
void raise_unless(bool finished) {
    if (finished) return;
    const py::gil_scoped_acquire gil;
    throw py::error_already_set();
}

void add_graph_conv(Engine& engine, int input, int output, int residual, const std::string& activation, int64_t c_in,
                    int64_t c_out, uintptr_t weight, uintptr_t own, uintptr_t neighbors, uintptr_t adjacency,
                    uintptr_t bias) {
    engine.add(GraphConvLayer{input, output, residual, activation_of(activation), c_in, c_out,
                              address<float>(weight, "weight"), address<float>(own, "own"),
                              address<float>(neighbors, "neighbors"), address<float>(adjacency, "adjacency"),
                              address<float>(bias, "bias")});
}

void add_linear(Engine& engine, int input, int output, int residual, int64_t c_in, int64_t c_out, uintptr_t weight,
                uintptr_t bias, bool bias_per_joint) {
    engine.add(LinearLayer{input, output, residual, c_in, c_out, address<float>(weight, "weight"),
                           address<float>(bias, "bias"), bias_per_joint});
}

void add_scale_shift(Engine& engine, int input, int output, bool normalize, float eps, int64_t channels,
                     int64_t offset) {
    engine.add(ScaleShiftLayer{input, output, normalize, eps, channels, offset});
}

void add_attention(Engine& engine, int input, int output, int64_t num_heads, int64_t channels) {
    engine.add(AttentionLayer{input, output, num_heads, channels});
}

void denoise(const Engine& engine, uintptr_t sample, uintptr_t condition, uintptr_t parameters, int64_t num_poses,
             int num_threads, uintptr_t out) {
    require(num_poses >= 0 && num_threads >= 1, "num_poses must not be negative, num_threads positive");
    if (num_poses == 0) return;
    const DenoiseArgs args = {address<float>(sample, "sample"),
                              pointer<const float>(condition, engine.num_condition_channels(), "condition"),
                              pointer<const float>(parameters, engine.num_parameters(), "parameters"),
                              num_poses,
                              num_threads,
                              pointer<float>(out, 1, "out")};
    raise_unless(engine.denoise(args, interrupted));
}

void sample(const Engine& engine, uintptr_t condition, uintptr_t coefficients, uintptr_t noise_scale,
            uintptr_t parameters, int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids,
            std::optional<float> clip, int64_t num_frames, int64_t num_hypotheses, int64_t num_steps, int num_threads,
            uintptr_t out) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    require(num_steps >= 1 && num_steps < kPhiloxMaxStep, "num_steps must lie in [1, 65534]");
    check_threads(num_threads);
    if (numel_of({num_frames, num_hypotheses, 64}) == 0) return;
    const SampleArgs args = {pointer<const float>(condition, engine.num_condition_channels(), "condition"),
                             address<float>(coefficients, "coefficients"),
                             reinterpret_cast<const float*>(noise_scale),
                             pointer<const float>(parameters, engine.num_parameters(), "parameters"),
                             {static_cast<uint64_t>(seed), address<int64_t>(frame_ids, "frame_ids"),
                              address<int64_t>(hypothesis_ids, "hypothesis_ids")},
                             clip.value_or(std::numeric_limits<float>::infinity()),
                             num_frames,
                             num_hypotheses,
                             num_steps,
                             num_threads,
                             pointer<float>(out, 1, "out")};
    raise_unless(engine.sample(args, interrupted));
}

}  // namespace

void bind_engine(py::module_& m) {
    py::class_<Engine> type(m, "Engine");
    type.def(py::init<int64_t, std::vector<int64_t>, bool>(), py::arg("num_joints"), py::arg("widths"),
             py::arg("bfloat16"));
    type.def_property_readonly("isa", [](const Engine& engine) { return isa_name(engine.isa()); });
    type.def_property_readonly("num_parameters", &Engine::num_parameters);
    type.def_property_readonly("weight_bytes", &Engine::weight_bytes);
    type.def("padded", &Engine::padded, py::arg("channels"));
    define(type, "add_graph_conv", &add_graph_conv, "input", "output", "residual", "activation", "c_in", "c_out",
           "weight", "own", "neighbors", "adjacency", "bias");
    define(type, "add_linear", &add_linear, "input", "output", "residual", "c_in", "c_out", "weight", "bias",
           "bias_per_joint");
    define(type, "add_scale_shift", &add_scale_shift, "input", "output", "normalize", "eps", "channels", "offset");
    define(type, "add_attention", &add_attention, "input", "output", "num_heads", "channels");
    define_without_gil(type, "denoise", &denoise, "sample", "condition", "parameters", "num_poses", "num_threads",
                       "out");
    define_without_gil(type, "sample", &sample, "condition", "coefficients", "noise_scale", "parameters", "seed",
                       "frame_ids", "hypothesis_ids", "clip", "num_frames", "num_hypotheses", "num_steps",
                       "num_threads", "out");
}

}  // namespace diffupose
