// diffupose._cuda: what Python sees of the CUDA code. Pointers are addresses on the device, the stream is a handle.
#include <pybind11/pybind11.h>

#include "bind_checks.h"
#include "bind_ops_cuda.h"
#include "common/build_info.h"
#include "common/cuda_info.h"
#include "philox_normal/philox_normal_cuda.h"

namespace py = pybind11;

namespace diffupose {
void bind_engine_cuda(py::module_& m);
}
using diffupose::pointer;
using diffupose::require;

namespace {

void philox_normal(int64_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids, int64_t step, uintptr_t out,
                   int64_t num_frames, int64_t num_hypotheses, int64_t num_elements, uintptr_t stream) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    require(step >= 0 && step <= diffupose::kPhiloxMaxStep, "step must lie in [0, 65535]");
    require(num_elements >= 0 && num_elements <= diffupose::kPhiloxMaxElements, "num_elements must be below 262145");
    const int64_t numel = diffupose::numel_of({num_frames, num_hypotheses, num_elements});
    if (numel == 0) return;
    diffupose::launch_philox_normal_cuda(
        static_cast<uint64_t>(seed), pointer<const int64_t>(frame_ids, num_frames, "frame_ids"),
        pointer<const int64_t>(hypothesis_ids, num_hypotheses, "hypothesis_ids"), static_cast<uint32_t>(step),
        pointer<float>(out, numel, "out"), {num_frames, num_hypotheses, num_elements}, reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of diffupose.";
    m.def("source_hash", &diffupose::source_hash);
    m.def("runtime_version", &diffupose::cuda_runtime_version);
    m.def("driver_version", &diffupose::cuda_driver_version);
    m.def("has_code", &diffupose::cuda_has_code);
    m.def("multiprocessors", &diffupose::cuda_multiprocessors);
    m.def("shared_bytes", &diffupose::cuda_shared_bytes);
    diffupose::bind_engine_cuda(m);
    m.def("philox_normal", &philox_normal, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("seed"),
          py::arg("frame_ids"), py::arg("hypothesis_ids"), py::arg("step"), py::arg("out"), py::arg("num_frames"),
          py::arg("num_hypotheses"), py::arg("num_elements"), py::arg("stream"));
    diffupose::bind_ops_cuda(m);
}
