// What the .cu files include instead of CUDA's headers, so that they compile twice: by nvcc for the GPU, and by a plain
// C++ compiler for the CPU, where tests/cpp/cuda_emulation runs every CUDA thread as a fibre or a thread.
//
// Kernels are launched by DIFFUPOSE_LAUNCH; dynamic shared memory is declared by DIFFUPOSE_DYNAMIC_SHARED; instructions
// that C++ has no word for stand in small functions with a branch for either compiler.
#pragma once

#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DIFFUPOSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DIFFUPOSE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace diffupose {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether a kernel could be launched; what it does later shows at the next synchronisation.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Must be called before a launch with more than 48 KiB of dynamic shared memory.
template <typename Kernel>
void allow_shared_bytes(Kernel kernel, int bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

}  // namespace diffupose

#else

#include "cuda_emulation.h"

#endif
