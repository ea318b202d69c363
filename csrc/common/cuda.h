// What the .cu files include instead of CUDA's headers, so that they compile twice: by nvcc for the GPU, and by a plain
// C++ compiler for the CPU, where tests/cpp/cuda_emulation runs every CUDA thread as a fibre or a thread.
//
// Kernels are launched by DIFFUPOSE_LAUNCH; dynamic shared memory is declared by DIFFUPOSE_DYNAMIC_SHARED; instructions
// that C++ has no word for stand in small functions with a branch for either compiler.
//
// DIFFUPOSE_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, early, arguments...): where `early` is true, which
// it may be where `waits(kernel)` is, the kernel may start as soon as all blocks of the one before it in the stream
// have said let_next_kernel_start() or ended, to fetch what no earlier kernel writes. Before it touches what one wrote,
// or writes anything itself, it says wait_for_earlier_kernels(). Every thread of it must say so before it ends, even
// one that has nothing to wait for: a kernel knows only of the one before it, which therefore must not end before those
// before that one.
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
    cudaGetLastError();  // what is told here shall not be found by whoever asks next
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether a kernel could be launched; what it does later shows at the next synchronisation.
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
    // All there is: another thread may set it too, for less, before this one launches.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
}

// Whether a kernel, as it was compiled for this GPU, has the instruction behind wait_for_earlier_kernels(), and whether
// graphs know what it means.
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
