// The .cu files include this instead of CUDA's headers, so that two compilers take them: nvcc for the GPU, and a plain
// C++ compiler for the CPU, where tests/cpp/cuda_emulation runs every CUDA thread as a fibre or a thread.
//
// DIFFUPOSE_LAUNCH launches a kernel. DIFFUPOSE_DYNAMIC_SHARED declares dynamic shared memory. Instructions without a
// C++ equivalent are small functions with a branch for each compiler.
//
// DIFFUPOSE_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, early, arguments...) lets a kernel start early, if
// `early` and `waits(kernel)` are true: as soon as all blocks of its predecessor in the stream have called
// let_next_kernel_start() or ended. The kernel may then load what no earlier kernel writes. It must call
// wait_for_earlier_kernels() before it reads what one wrote, and before it writes anything. Each kernel waits only for
// its predecessor, so every thread waits before it exits.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DIFFUPOSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define DIFFUPOSE_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, early, ...) \
    diffupose::launch_early(kernel, grid, block, shared_bytes, stream, early, __VA_ARGS__)
#define DIFFUPOSE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace diffupose {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next check does not report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Throws if a kernel could not be launched. Errors while it runs show at the next synchronisation.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Must be called before a launch with more than 48 KiB of dynamic shared memory.
template <typename Kernel>
void allow_shared_bytes(Kernel kernel, int bytes) {
    int device = 0, most = 0;
    cudaFuncAttributes attributes;
    check_cuda(cudaGetDevice(&device), "the current device");
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "a device's attribute");
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    most -= static_cast<int>(attributes.sharedSizeBytes);
    if (bytes > most) check_cuda(cudaErrorInvalidValue, "shared memory");
    // The maximum, since another thread may set a smaller value before this one launches.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
}

// Whether a kernel's code for this GPU has the instruction of wait_for_earlier_kernels(), and whether CUDA graphs
// support it.
template <typename Kernel>
bool waits(Kernel kernel) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    int driver = 0;
    check_cuda(cudaDriverGetVersion(&driver), "version of the driver");
    return attributes.ptxVersion >= 90 && driver >= 12030 && CUDART_VERSION >= 12030;
}

template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, void* stream, bool early,
                  const Arguments&... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "a launch");
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace diffupose

#else

#include "cuda_emulation.h"

#endif
