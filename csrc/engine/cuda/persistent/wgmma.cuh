// Hopper's matrix instruction in small functions. A warpgroup of four warps multiplies 64 rows by all columns of a pose
// tile.
//
// D += A B. A, 64 x 16 bfloat16, lies in registers: warp w of the group holds rows 16 w to 16 w + 15. Lane 4 g + t
// holds rows g and g + 8 of these, columns 2t, 2t + 1 and 2t + 8, 2t + 9. The order of registers is row g, row g + 8,
// then the same for the upper columns. B, 16 x 8 n, lies in shared memory; a descriptor tells where. Of every eight
// columns of D a lane holds columns 2t and 2t + 1 of row g, then of row g + 8.
//
// Only machine code for sm_90a has the instruction. Elsewhere these functions do nothing, and kernels that call them
// are never launched (see launch_sample_wgmma).
#pragma once

#include "common/bfloat16.h"
#include "common/cuda.h"
#include "engine/cuda/fragments.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DIFFUPOSE_WGMMA 1
#endif

namespace diffupose {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;

// --- Shared memory ---------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Four bytes at an offset in shared memory, 0 if not `wanted`. This function and the next have no branch, so that the
// code of all joints is one basic block for the compiler.
__device__ inline uint32_t load_shared_if(bool wanted, const unsigned char* memory, int offset) {
#ifdef __CUDACC__
    uint32_t word;
    asm volatile(
        "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %2, 0;\nmov.b32 %0, 0;\n@wanted ld.shared.b32 %0, [%1];\n}\n"
        : "=r"(word)
        : "r"(shared_address(memory) + offset), "r"(static_cast<int>(wanted)));
    return word;
#else
    return wanted ? *reinterpret_cast<const uint32_t*>(memory + offset) : 0;
#endif
}

// Stores two numbers: as float32 at `wide_offset` if `wide`, else as bfloat16 at `offset`.
__device__ inline void store_shared_either(bool wide, unsigned char* memory, int wide_offset, int offset,
                                           float2 value) {
    const uint32_t word = pack_bfloat16(value.x, value.y);
#ifdef __CUDACC__
    asm volatile(
        "{\n.reg .pred wide;\nsetp.ne.b32 wide, %0, 0;\n@!wide st.shared.b32 [%1], %2;\n"
        "@wide st.shared.v2.f32 [%3], {%4, %5};\n}\n" ::"r"(static_cast<int>(wide)),
        "r"(shared_address(memory) + offset), "r"(word), "r"(shared_address(memory) + wide_offset), "f"(value.x),
        "f"(value.y));
#else
    if (wide) {
        *reinterpret_cast<float2*>(memory + wide_offset) = value;
    } else {
        *reinterpret_cast<uint32_t*>(memory + offset) = word;
    }
#endif
}

// --- B in shared memory ----------------------------------------------------------------------------------------------

// The descriptor of B: its address, and how its core matrices lie, which are eight rows of eight numbers in 128 bytes.
// Core matrices of the next eight columns are `column_bytes` further, those of the next eight rows follow at once.
__device__ inline uint64_t describe(const void* b, int column_bytes) {
#ifdef __CUDA_ARCH__
    const auto address = uint64_t{shared_address(b)};
#elif !defined(__CUDACC__)
    const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(b) - emulation::shared_memory());
#else
    const uint64_t address = 0;
#endif
    constexpr uint64_t kRowBytes = 128;
    return address >> 4 | kRowBytes >> 4 << 16 | static_cast<uint64_t>(column_bytes >> 4) << 32;
}

// The descriptor of a B that lies `bytes` further.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) {
    return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// --- The product -----------------------------------------------------------------------------------------------------

#define DIFFUPOSE_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define DIFFUPOSE_SIXTEEN(i) \
    DIFFUPOSE_FOUR(i), DIFFUPOSE_FOUR((i) + 4), DIFFUPOSE_FOUR((i) + 8), DIFFUPOSE_FOUR((i) + 12)
#define DIFFUPOSE_SIXTYFOUR DIFFUPOSE_SIXTEEN(0), DIFFUPOSE_SIXTEEN(16), DIFFUPOSE_SIXTEEN(32), DIFFUPOSE_SIXTEEN(48)
#define DIFFUPOSE_NAMES                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
    "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
    "%58, %59, %60, %61, %62, %63"

// d += A B, where B has 8 kColumns columns. All threads of the warpgroup must call it.
template <int kColumns>
__device__ inline void multiply_group(float (&d)[4 * kColumns], const uint4& a, uint64_t b) {
    static_assert(kColumns == 16 || kColumns == 17);
#ifdef DIFFUPOSE_WGMMA
    if constexpr (kColumns == 16) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DIFFUPOSE_NAMES
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                     : DIFFUPOSE_SIXTYFOUR
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 {" DIFFUPOSE_NAMES
                     ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, 1, 1, 1, 1;\n"
                     : DIFFUPOSE_SIXTYFOUR, DIFFUPOSE_FOUR(64)
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b));
    }
#elif !defined(__CUDACC__)
    const uint32_t mine[4] = {a.x, a.y, a.z, a.w};
    emulation::WarpWords all;
    emulation::exchange(0xffffffffu, mine, 4, all);
    const int row = emulation::lane() / 4, first = emulation::lane() % 4 * 2;
    const unsigned char* start = emulation::shared_memory() + ((b & 0x3fff) << 4);
    const int row_bytes = static_cast<int>(b >> 16 & 0x3fff) << 4, column_bytes = static_cast<int>(b >> 32 & 0x3fff)
                                                                                  << 4;
    for (int i = 0; i < 4 * kColumns; ++i) {
        const unsigned char* column = start + i / 4 * column_bytes + 2 * (first + i % 2);
        for (int k = 0; k < 16; ++k) {
            const uint32_t word = all[4 * row + k % 8 / 2][i / 2 % 2 + k / 8 * 2];
            Bfloat16 from_b;
            memcpy(&from_b, column + k / 8 * row_bytes + k % 8 * 16, 2);
            d[i] += float_of(k % 2 ? word & 0xffff0000u : word << 16) * float_of(uint32_t{from_b.bits} << 16);
        }
    }
#endif
}

#undef DIFFUPOSE_FOUR
#undef DIFFUPOSE_SIXTEEN
#undef DIFFUPOSE_SIXTYFOUR
#undef DIFFUPOSE_NAMES

// --- Ordering --------------------------------------------------------------------------------------------------------

// Must come before a product if other instructions have written its registers, A or sums.
__device__ inline void begin_products() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Makes the products since the last call a group.
__device__ inline void commit_products() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Waits for all but the last kPending groups of products.
template <int kPending>
__device__ inline void wait_for_products() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Makes this thread's stores to shared memory visible to products that other threads issue after the next barrier.
__device__ inline void publish_to_products() {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Named barriers of the block. Some threads only arrive: `sync_barrier` waits until kBlockThreads have arrived or wait.
// __syncthreads() is barrier 0.
constexpr int kBlockThreads = 2 * kGroupThreads;

__device__ inline void sync_barrier(int barrier) {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(kBlockThreads) : "memory");
#elif !defined(__CUDACC__)
    emulation::sync_barrier(barrier, kBlockThreads);
#endif
}

__device__ inline void arrive_at_barrier(int barrier) {
#ifdef DIFFUPOSE_WGMMA
    asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "n"(kBlockThreads) : "memory");
#elif !defined(__CUDACC__)
    emulation::arrive_at_barrier(barrier, kBlockThreads);
#endif
}

}  // namespace diffupose
