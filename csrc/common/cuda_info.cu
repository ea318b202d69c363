#include "common/cuda.h"
#include "common/cuda_info.h"

namespace diffupose {

int cuda_runtime_version() {
#ifdef __CUDACC__
    return CUDART_VERSION;
#else
    return 0;
#endif
}

int cuda_driver_version() {
    int version = 0;
#ifdef __CUDACC__
    if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
#endif
    return version;
}

#ifdef __CUDACC__

static int attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "the current device");
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "a device's attribute");
    return value;
}

int cuda_multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int cuda_shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

#else

int cuda_multiprocessors() { return 2; }
int cuda_shared_bytes() { return emulation::kMaxSharedBytes; }

#endif

}  // namespace diffupose
