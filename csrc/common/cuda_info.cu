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

}  // namespace diffupose
