// Clusters: blocks that run at the same time and write into each other's shared memory. GPUs have them from compute
// capability 9.0 on. On others these functions do nothing, and kernels that call them are never launched (see
// clusters_together).
//
// A mailbox of the receiving block counts the bytes that arrive. A thread that has waited for all bytes can read them.
// This needs no fence, while a barrier of the cluster has one, which costs a way to L2 and back.
#pragma once

#include <cstdint>

#include "common/cuda.h"

#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define DIFFUPOSE_CLUSTERS 1
#endif

namespace diffupose {

// Blocks of a cluster: the most that every GPU with clusters supports. The emulation takes fewer, to have fewer
// threads.
#ifdef __CUDACC__
constexpr int kClusterBlocks = 8;
#else
constexpr int kClusterBlocks = 2;
#endif

// The number of this block within its cluster. Grids of clusters have one dimension.
__device__ __forceinline__ int cluster_rank() { return static_cast<int>(blockIdx.x) % kClusterBlocks; }

// Counts the bytes that other blocks write into this block's shared memory. One thread opens it; other blocks may use
// it after a barrier of the cluster. Each delivery has these steps: one thread calls expect_mail with the number of
// bytes, before or after the first of them arrive, and wait_for_mail returns when all have arrived. `times` is the
// number of earlier deliveries. The next delivery must not begin before this one is complete, so senders alternate
// between two mailboxes.
#ifdef __CUDACC__
struct Mailbox {
    uint64_t word;
};
#else
using Mailbox = emulation::Mailbox;
#endif

__device__ __forceinline__ void open_mailbox(Mailbox& mailbox) {
#if !defined(__CUDACC__)
    mailbox.open();
#elif defined(DIFFUPOSE_CLUSTERS)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(&mailbox)))
        : "memory");
#else
    (void)mailbox;
#endif
}

__device__ __forceinline__ void expect_mail(Mailbox& mailbox, int bytes) {
#if !defined(__CUDACC__)
    mailbox.expect(bytes);
#elif defined(DIFFUPOSE_CLUSTERS)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(&mailbox))),
                 "r"(bytes)
                 : "memory");
#else
    (void)mailbox, (void)bytes;
#endif
}

// Writes 16 bytes into another block's shared memory, and counts them in its mailbox. `here` and `mailbox` are the
// corresponding addresses in this block.
__device__ __forceinline__ void send(int rank, void* here, uint4 words, Mailbox& mailbox) {
#if !defined(__CUDACC__)
    emulation::send(rank, here, &words, 16, mailbox);
#elif defined(DIFFUPOSE_CLUSTERS)
    asm volatile(
        "{\n"
        ".reg .b32 there, box;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 box, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [box];\n"
        "}\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(here))),
        "r"(static_cast<unsigned>(__cvta_generic_to_shared(&mailbox))), "r"(rank), "r"(words.x), "r"(words.y),
        "r"(words.z), "r"(words.w)
        : "memory");
#else
    (void)rank, (void)here, (void)words, (void)mailbox;
#endif
}

#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ >= 13
#define DIFFUPOSE_TRY_WAIT "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64"
#else
#define DIFFUPOSE_TRY_WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#endif

// The fence covers shared memory only; a fence for all memory would invalidate L1. Older compilers cannot express this.
// Their wait acquires at the scope of the block, which compiles to the same instructions.
__device__ __forceinline__ void wait_for_mail(Mailbox& mailbox, unsigned times) {
#if !defined(__CUDACC__)
    mailbox.wait(times);
#elif defined(DIFFUPOSE_CLUSTERS)
    unsigned done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred done;\n" DIFFUPOSE_TRY_WAIT
            " done, [%1], %2;\n"
            "selp.b32 %0, 1, 0, done;\n"
            "}\n"
            : "=r"(done)
            : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&mailbox))), "r"(times % 2)
            : "memory");
    } while (!done);
#if __CUDACC_VER_MAJOR__ >= 13
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#endif
#else
    (void)mailbox, (void)times;
#endif
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
#if !defined(__CUDACC__)
    emulation::sync_cluster();
#elif defined(DIFFUPOSE_CLUSTERS)
    asm volatile(
        "barrier.cluster.arrive.aligned;\n"
        "barrier.cluster.wait.aligned;\n" ::
            : "memory");
#endif
}

#ifdef __CUDACC__

template <typename Kernel>
cudaLaunchConfig_t cluster_config(Kernel kernel, int64_t clusters, int threads, int shared_bytes,
                                  cudaLaunchAttribute& attribute) {
    allow_shared_bytes(kernel, shared_bytes);
    attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterBlocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(clusters * kClusterBlocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.attrs = &attribute, config.numAttrs = 1;
    return config;
}

// How many clusters the current GPU holds at the same time; 0 if it has none, none so large, or no code for them.
template <typename Kernel>
int clusters_together(Kernel kernel, int threads, int shared_bytes) {
    int device = 0, can = 0, most_bytes = 0, clusters = 0;
    check_cuda(cudaGetDevice(&device), "the current device");
    check_cuda(cudaDeviceGetAttribute(&can, cudaDevAttrClusterLaunch, device), "a device's attribute");
    check_cuda(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "a device's attribute");
    if (!can || shared_bytes > most_bytes) return 0;
    cudaFuncAttributes code;
    check_cuda(cudaFuncGetAttributes(&code, kernel), "attributes of a kernel");
    if (code.ptxVersion < 90) return 0;  // PTX of an older architecture, in which the kernel does nothing
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config(kernel, 1, threads, shared_bytes, attribute);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
        cudaGetLastError();  // clears the error
        return 0;
    }
    return clusters;
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int threads, int shared_bytes, void* stream,
                     const Arguments&... arguments) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = cluster_config(kernel, clusters, threads, shared_bytes, attribute);
    config.stream = static_cast<cudaStream_t>(stream);
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "a launch");
}

#define DIFFUPOSE_LAUNCH_CLUSTERS(kernel, clusters, threads, shared_bytes, stream, ...) \
    diffupose::launch_clusters(kernel, clusters, threads, shared_bytes, stream, __VA_ARGS__)

#else

template <typename Kernel>
int clusters_together(Kernel, int, int shared_bytes) {
    return shared_bytes > emulation::kMaxSharedBytes ? 0 : 3;
}

#define DIFFUPOSE_LAUNCH_CLUSTERS(kernel, clusters, threads, shared_bytes, stream, ...)        \
    ((void)(stream),                                                                           \
     diffupose::emulation::launch(                                                             \
         #kernel, __FILE__, dim3(static_cast<unsigned>(clusters) * diffupose::kClusterBlocks), \
         static_cast<unsigned>(threads), shared_bytes, [=] { kernel(__VA_ARGS__); }, diffupose::kClusterBlocks))

#endif

}  // namespace diffupose
