// diffupose._C: one thin function per launcher. Tensors come as addresses; dtype, device, shape and contiguity have
// been checked in Python, null pointers and sizes are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/build_info.h"
#include "common/philox.h"
#include "philox_normal/philox_normal.h"

namespace py = pybind11;

namespace {

// The address of a tensor's data. A fake tensor's is null, and an empty tensor's may be.
template <typename T>
T* pointer(uintptr_t address, int64_t numel, const char* name) {
    if (address == 0 && numel > 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
    return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

void philox_normal(int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t out,
                   int64_t num_frames, int64_t num_hypotheses, int64_t num_elements, int num_threads) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    require(num_elements >= 0 && num_elements <= diffupose::kPhiloxMaxElements, "num_elements must lie in [0, 262144]");
    require(step >= 0 && step <= diffupose::kPhiloxMaxStep, "step must lie in [0, 65535]");
    require(num_threads >= 1, "num_threads must be at least 1");
    const int64_t numel = num_frames * num_hypotheses * num_elements;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of diffupose for the CPU.";
    m.def("source_hash", &diffupose::source_hash);
    m.def("has_openmp", &diffupose::has_openmp);
    m.def("philox_4x32_10", &philox_4x32_10, py::arg("counter"), py::arg("key"));
    m.def("philox_normal", &philox_normal, py::call_guard<py::gil_scoped_release>(), py::arg("seed"),
          py::arg("frame_ids"), py::arg("hypothesis_ids"), py::arg("step"), py::arg("out"), py::arg("num_frames"),
          py::arg("num_hypotheses"), py::arg("num_elements"), py::arg("num_threads"));
}
