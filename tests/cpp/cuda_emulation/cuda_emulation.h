// CUDA for a plain C++ compiler: the same .cu sources run on the CPU, block after block, or cluster after cluster.
//
// A CUDA thread is a fibre (default), taken in forward, reverse or random order between two barriers, or with
// DIFFUPOSE_EMULATE_THREADS a thread of the operating system, for ThreadSanitizer. Checked are indices, tails, staging
// in shared memory, where barriers stand, and that a barrier is reached by all: here a thread that has returned counts
// as missing, which GPUs forgive. So is how accesses by common/cuda_storage.h are aligned, and
// UndefinedBehaviorSanitizer checks the others. Not checked: what nvcc makes of the source, the memory model beyond
// barriers, what blocks do to each other at the same time, speed.
//
// Dynamic shared memory is NaN when a block begins; __shared__ arrays hold what the block before left, and all blocks
// of a cluster have the same. Blocks come in the order of the threads, forward, reverse or random. A copy that nobody
// waits for at once is made when somebody does.
//
// Shuffles and matrix products exchange values between the threads of a warp, but order nothing else they wrote: on the
// GPU, too, only __syncwarp() and __syncthreads() do.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one after the other: one copy is enough.
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace diffupose::emulation {

constexpr int kWarp = 32;
// The most dynamic shared memory a block may have, as on sm_90.
constexpr int kMaxSharedBytes = 227 << 10;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Indices {
    dim3 thread, block, block_dim, grid_dim;
    int in_cluster = 0;          // which of its blocks
    bool waited = false;         // for earlier kernels
    std::vector<Copy> copies{};  // that are under way
};

// Of the CUDA thread that runs now.
Indices& indices();
unsigned char* shared_memory();

void sync_threads();
// Barriers of the block by their numbers, 1 to 15, which some threads wait at and others pass: `count` must come in
// all.
constexpr int kBarriers = 16;
void sync_barrier(int barrier, int count);
void arrive_at_barrier(int barrier, int count);
// Orders what the threads of the mask wrote. All of them must come.
void sync_warp(uint32_t mask);

// Gives every thread of the warp that takes part what each of them gave, at most kMaxWords words: all[lane]. It orders
// nothing else.
constexpr int kMaxWords = 8;
using WarpWords = uint32_t[kWarp][kMaxWords];
void exchange(uint32_t mask, const uint32_t* mine, int words, WarpWords& all);

// Counts bytes that are sent to a block of a cluster, as common/cuda_cluster.h says.
class Mailbox {
   public:
    void open();
    void expect(int bytes);
    void wait(unsigned times);
    void come(int bytes);

   private:
    static constexpr int kUnsaid = 1 << 28;  // nobody has said how many are expected
    void add(int count);
    std::atomic<int> missing_;
    std::atomic<uint32_t> times_;  // how often all have come
    std::atomic<int> waiting_;
};
// Writes to where in the shared memory of another block lies what is here in that of this one.
void send(int block_in_cluster, void* here, const void* from, int bytes, Mailbox& mailbox);
void sync_cluster();

// Copies of this thread.
void copy_async(void* to, const void* from, int bytes);
void wait_for_copies();

// Ends the process if an address that is to be accessed at once is not a multiple of `bytes`, as on the GPU.
void require_aligned(const void* address, int bytes);

// `cluster` blocks, one after the other in a grid of one dimension, run at the same time.
void launch(const char* name, const char* file, dim3 grid, dim3 block, int shared_bytes,
            const std::function<void()>& kernel, int cluster = 1);

// Ends the process unless this thread has waited for earlier kernels.
void require_wait();

// The most that a kernel was launched with, by its name and the file that launched it.
struct Launched {
    int threads = 0, shared_bytes = 0;
};
using Launches = std::map<std::pair<std::string, std::string>, Launched>;
Launches& launches();

int lane();
// Ends the process unless a lane takes part in an exchange: what others give is undefined.
void require_lane(uint32_t mask, int source);

template <typename T>
T from_lane(uint32_t mask, T value, int source) {
    static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 4 * kMaxWords);
    require_lane(mask, source);
    uint32_t words[sizeof(T) / 4];
    std::memcpy(words, &value, sizeof(T));
    WarpWords all;
    exchange(mask, words, sizeof(T) / 4, all);
    T result;
    std::memcpy(&result, all[source], sizeof(T));
    return result;
}

}  // namespace diffupose::emulation

#define threadIdx (diffupose::emulation::indices().thread)
#define blockIdx (diffupose::emulation::indices().block)
#define blockDim (diffupose::emulation::indices().block_dim)
#define gridDim (diffupose::emulation::indices().grid_dim)

#define DIFFUPOSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ((void)(stream),                                                     \
     diffupose::emulation::launch(#kernel, __FILE__, grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
// Kernels run one after the other here; but a kernel that is launched early says that it waits.
#define DIFFUPOSE_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, early, ...)                                \
    ((void)(stream), (void)(early), diffupose::emulation::launch(#kernel, __FILE__, grid, block, shared_bytes, [=] { \
         kernel(__VA_ARGS__);                                                                                        \
         diffupose::emulation::require_wait();                                                                       \
     }))
#define DIFFUPOSE_DYNAMIC_SHARED(name) unsigned char* const name = diffupose::emulation::shared_memory()

inline void __syncthreads() { diffupose::emulation::sync_threads(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { diffupose::emulation::sync_warp(mask); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
    return diffupose::emulation::from_lane(mask, value, source);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
    return diffupose::emulation::from_lane(mask, value, diffupose::emulation::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance) {
    const int lane = diffupose::emulation::lane();
    const int source = lane + distance;
    return diffupose::emulation::from_lane(mask, value, source < diffupose::emulation::kWarp ? source : lane);
}

template <typename T>
T __ldg(const T* address) {
    return *address;
}

template <typename T>
T __ldcg(const T* address) {
    return *address;
}

namespace diffupose {

inline void let_next_kernel_start() {}
inline void wait_for_earlier_kernels() { emulation::indices().waited = true; }
template <typename Kernel>
bool waits(Kernel) {
    return true;
}

inline void check_launch(const char*) {}
template <typename Kernel>
void allow_shared_bytes(Kernel, int) {}

}  // namespace diffupose
