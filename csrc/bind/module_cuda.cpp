// diffupose._cuda. Addresses of tensors are those of the device, a stream is its handle.
#include "bind/bind.h"
#include "common/build_info.h"
#include "common/cuda_info.h"

namespace diffupose {

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of diffupose.";
    m.def("source_hash", &source_hash);
    m.def("runtime_version", &cuda_runtime_version);
    m.def("driver_version", &cuda_driver_version);
    m.def("has_code", &cuda_has_code);
    m.def("multiprocessors", &cuda_multiprocessors);
    m.def("shared_bytes", &cuda_shared_bytes);
    bind_engine_cuda(m);
    bind_ops_cuda(m);
}

}  // namespace diffupose
