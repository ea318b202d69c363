// diffupose._C: one thin function per launcher. Tensors come as addresses; dtype, device, shape and contiguity have
// been checked in Python, null pointers and sizes are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_checks.h"
#include "bind_ops.h"
#include "common/build_info.h"
#include "common/isa.h"
#include "common/philox.h"
#include "engine/cpu/engine.h"
#include "philox_normal/philox_normal.h"

namespace py = pybind11;

namespace {

using diffupose::pointer;
using diffupose::require;

void philox_normal(int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t out,
                   int64_t num_frames, int64_t num_hypotheses, int64_t num_elements, int num_threads) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    require(num_elements >= 0 && num_elements <= diffupose::kPhiloxMaxElements, "num_elements must lie in [0, 262144]");
    require(step >= 0 && step <= diffupose::kPhiloxMaxStep, "step must lie in [0, 65535]");
    require(num_threads >= 1, "num_threads must be at least 1");
    const int64_t numel = diffupose::numel_of({num_frames, num_hypotheses, num_elements});
    if (numel == 0) return;
    diffupose::launch_philox_normal(
        static_cast<uint64_t>(seed), pointer<const int64_t>(frame_ids, num_frames, "frame_ids"),
        pointer<const int64_t>(hypothesis_ids, num_hypotheses, "hypothesis_ids"), static_cast<uint32_t>(step),
        pointer<float>(out, numel, "out"), {num_frames, num_hypotheses, num_elements}, num_threads);
}

py::tuple philox_4x32_10(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const diffupose::PhiloxWords words =
        diffupose::philox_4x32_10({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
    return py::make_tuple(words.w0, words.w1, words.w2, words.w3);
}

using diffupose::Activation;
using diffupose::Engine;

Activation activation_of(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "relu") return Activation::relu;
    require(name == "gelu", "activation must be none, relu or gelu");
    return Activation::gelu;
}

template <typename T>
const T* address(uintptr_t value, const char* name) {
    return pointer<const T>(value, 1, name);
}

// Whether a signal came whose handler raised (Ctrl-C); called on the thread that called from Python.
bool interrupted() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

void bind_engine(py::module_& m) {
    py::class_<Engine>(m, "Engine")
        .def(py::init<int64_t, std::vector<int64_t>, bool>(), py::arg("num_joints"), py::arg("widths"),
             py::arg("bfloat16"))
        .def_property_readonly("isa", [](const Engine& engine) { return diffupose::isa_name(engine.isa()); })
        .def_property_readonly("num_parameters", &Engine::num_parameters)
        .def_property_readonly("weight_bytes", &Engine::weight_bytes)
        .def("padded", &Engine::padded, py::arg("channels"))
        .def(
            "add_graph_conv",
            [](Engine& engine, int input, int output, int residual, const std::string& activation, int64_t c_in,
               int64_t c_out, uintptr_t weight, uintptr_t own, uintptr_t neighbors, uintptr_t adjacency,
               uintptr_t bias) {
                engine.add(diffupose::GraphConvLayer{
                    input, output, residual, activation_of(activation), c_in, c_out, address<float>(weight, "weight"),
                    address<float>(own, "own"), address<float>(neighbors, "neighbors"),
                    address<float>(adjacency, "adjacency"), address<float>(bias, "bias")});
            },
            py::kw_only(), py::arg("input"), py::arg("output"), py::arg("residual"), py::arg("activation"),
            py::arg("c_in"), py::arg("c_out"), py::arg("weight"), py::arg("own"), py::arg("neighbors"),
            py::arg("adjacency"), py::arg("bias"))
        .def(
            "add_linear",
            [](Engine& engine, int input, int output, int residual, int64_t c_in, int64_t c_out, uintptr_t weight,
               uintptr_t bias, bool bias_per_joint) {
                engine.add(diffupose::LinearLayer{input, output, residual, c_in, c_out,
                                                  address<float>(weight, "weight"), address<float>(bias, "bias"),
                                                  bias_per_joint});
            },
            py::kw_only(), py::arg("input"), py::arg("output"), py::arg("residual"), py::arg("c_in"), py::arg("c_out"),
            py::arg("weight"), py::arg("bias"), py::arg("bias_per_joint"))
        .def(
            "add_scale_shift",
            [](Engine& engine, int input, int output, bool normalize, float eps, int64_t channels, int64_t offset) {
                engine.add(diffupose::ScaleShiftLayer{input, output, normalize, eps, channels, offset});
            },
            py::kw_only(), py::arg("input"), py::arg("output"), py::arg("normalize"), py::arg("eps"),
            py::arg("channels"), py::arg("offset"))
        .def(
            "add_attention",
            [](Engine& engine, int input, int output, int64_t num_heads, int64_t channels) {
                engine.add(diffupose::AttentionLayer{input, output, num_heads, channels});
            },
            py::kw_only(), py::arg("input"), py::arg("output"), py::arg("num_heads"), py::arg("channels"))
        .def(
            "denoise",
            [](const Engine& engine, uintptr_t sample, uintptr_t condition, uintptr_t parameters, int64_t num_poses,
               int num_threads, uintptr_t out) {
                require(num_poses >= 0 && num_threads >= 1, "num_poses must not be negative, num_threads positive");
                if (num_poses == 0) return;
                const diffupose::DenoiseArgs args = {
                    address<float>(sample, "sample"),
                    pointer<const float>(condition, engine.num_condition_channels(), "condition"),
                    pointer<const float>(parameters, engine.num_parameters(), "parameters"),
                    num_poses,
                    num_threads,
                    pointer<float>(out, 1, "out")};
                bool finished = false;
                {
                    const py::gil_scoped_release no_gil;
                    finished = engine.denoise(args, interrupted);
                }
                if (!finished) throw py::error_already_set();
            },
            py::kw_only(), py::arg("sample"), py::arg("condition"), py::arg("parameters"), py::arg("num_poses"),
            py::arg("num_threads"), py::arg("out"))
        .def(
            "sample",
            [](const Engine& engine, uintptr_t condition, uintptr_t coefficients, uintptr_t noise_scale,
               uintptr_t parameters, int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids,
               std::optional<float> clip, int64_t num_frames, int64_t num_hypotheses, int64_t num_steps,
               int num_threads, uintptr_t out) {
                require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
                require(num_steps >= 1 && num_steps < diffupose::kPhiloxMaxStep, "num_steps must lie in [1, 65534]");
                require(num_threads >= 1, "num_threads must be at least 1");
                if (diffupose::numel_of({num_frames, num_hypotheses, 64}) == 0) return;
                const diffupose::SampleArgs args = {
                    pointer<const float>(condition, engine.num_condition_channels(), "condition"),
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
                bool finished = false;
                {
                    const py::gil_scoped_release no_gil;
                    finished = engine.sample(args, interrupted);
                }
                if (!finished) throw py::error_already_set();
            },
            py::kw_only(), py::arg("condition"), py::arg("coefficients"), py::arg("noise_scale"), py::arg("parameters"),
            py::arg("seed"), py::arg("frame_ids"), py::arg("hypothesis_ids"), py::arg("clip"), py::arg("num_frames"),
            py::arg("num_hypotheses"), py::arg("num_steps"), py::arg("num_threads"), py::arg("out"));
}

// Operations a second of a loop that touches registers only, on one core; the best of several short runs.
double peak_flops(bool bfloat16) {
    const auto& kernels = diffupose::kernels_of(diffupose::active_isa());
    require(!bfloat16 || kernels.multiplies_bfloat16, "this instruction set has no bfloat16 products");
    double best = 0.0;
    volatile float sink = 0.0f;
    for (int run = 0; run < 8; ++run) {
        float sum = 0.0f;
        const auto begin = std::chrono::steady_clock::now();
        const double operations = kernels.peak_loop(1000000, bfloat16, &sum);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        sink = sum;
        if (operations / seconds.count() > best) best = operations / seconds.count();
    }
    (void)sink;
    return best;
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const diffupose::Isa isa : diffupose::usable_isas()) names.emplace_back(diffupose::isa_name(isa));
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of diffupose for the CPU.";
    m.def("source_hash", &diffupose::source_hash);
    m.def("has_openmp", &diffupose::has_openmp);
    m.def("usable_isas", &usable_isas);
    m.def("active_isa", [] { return diffupose::isa_name(diffupose::active_isa()); });
    m.def("peak_flops", &peak_flops, py::call_guard<py::gil_scoped_release>(), py::arg("bfloat16"));
    bind_engine(m);
    diffupose::bind_ops(m);
    m.def("philox_4x32_10", &philox_4x32_10, py::arg("counter"), py::arg("key"));
    m.def("philox_normal", &philox_normal, py::call_guard<py::gil_scoped_release>(), py::arg("seed"),
          py::arg("frame_ids"), py::arg("hypothesis_ids"), py::arg("step"), py::arg("out"), py::arg("num_frames"),
          py::arg("num_hypotheses"), py::arg("num_elements"), py::arg("num_threads"));
}
