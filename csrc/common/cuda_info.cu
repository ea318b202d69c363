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

// The driver is asked whether it has code for this kernel. It is never launched.
static __global__ void __launch_bounds__(32) some_kernel() {}

bool cuda_has_code() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, some_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();  // clears the error
        return false;
    }
    check_cuda(error, "attributes of a kernel");
    return true;
}

int cuda_multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int cuda_shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

#else

bool cuda_has_code() { return true; }
int cuda_multiprocessors() { return 2; }
int cuda_shared_bytes() { return emulation::kMaxSharedBytes; }

#endif

}  // namespace diffupose
