#include "cuda_emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace diffupose::emulation {
namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "CUDA emulation: %s\n", message.c_str());
    std::abort();
}

void pause_thread();

// A barrier for `count` threads, some of which may have returned from the kernel. The generation is read by those who
// wait; how much memory it orders is in the template argument.
template <bool Orders>
class Barrier {
   public:
    void reset(int count) { live_ = count, arrived_.store(0), generation_.store(0); }
    void wait(int expected) {
        constexpr auto order = Orders ? std::memory_order_acq_rel : std::memory_order_relaxed;
        constexpr auto load = Orders ? std::memory_order_acquire : std::memory_order_relaxed;
        constexpr auto store = Orders ? std::memory_order_release : std::memory_order_relaxed;
        const int generation = generation_.load(load);
        if (arrived_.fetch_add(1, order) + 1 == expected) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, store);
            return;
        }
        while (generation_.load(load) == generation) pause_thread();
    }

   private:
    int live_ = 0;
    std::atomic<int> arrived_{0}, generation_{0};
};

struct Warp {
    Barrier<true> barrier;
    Barrier<false> before, after;  // of an exchange
    std::atomic<uint32_t> words[kWarp][kMaxWords];
};

struct Block {
    Barrier<true> barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<unsigned char> shared;
    int count = 0;
};

Block block;  // blocks run one after the other

struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    Indices indices;
    bool done = false;
};

#ifdef DIFFUPOSE_EMULATE_THREADS
thread_local Indices current_indices;
#else
Indices* current_indices = nullptr;
ucontext_t scheduler;
Fibre* current_fibre = nullptr;
long switches = 0;  // since a thread last got past a barrier or ended
const std::function<void()>* current_kernel = nullptr;
#endif

#ifdef DIFFUPOSE_EMULATE_THREADS
void pause_thread() { std::this_thread::yield(); }
#else
void pause_thread() { swapcontext(&current_fibre->context, &scheduler); }
#endif

int flat_thread() {
    const Indices& at = indices();
    return static_cast<int>(at.thread.x + at.block_dim.x * (at.thread.y + at.block_dim.y * at.thread.z));
}

Warp& warp() { return *block.warps[static_cast<std::size_t>(flat_thread() / kWarp)]; }

int count_bits(uint32_t mask) { return __builtin_popcount(mask); }

Indices indices_of(dim3 grid, dim3 dims, dim3 at, int thread) {
    const unsigned t = static_cast<unsigned>(thread);
    return {dim3(t % dims.x, t / dims.x % dims.y, t / (dims.x * dims.y)), at, dims, grid};
}

#ifndef DIFFUPOSE_EMULATE_THREADS
void fibre_main() {
    (*current_kernel)();
    current_fibre->done = true;
    switches = 0;
    swapcontext(&current_fibre->context, &scheduler);
}

void run_block(dim3 grid, dim3 dims, dim3 at, const std::function<void()>& kernel, std::vector<Fibre>& fibres) {
    static const std::string order =
        std::getenv("DIFFUPOSE_EMULATION_ORDER") ? std::getenv("DIFFUPOSE_EMULATION_ORDER") : "forward";
    static std::mt19937 random(1);
    current_kernel = &kernel;
    std::vector<int> turn(fibres.size());
    for (std::size_t i = 0; i < fibres.size(); ++i) {
        turn[i] = static_cast<int>(i);
        Fibre& fibre = fibres[i];
        fibre.done = false;
        fibre.indices = indices_of(grid, dims, at, static_cast<int>(i));
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, fibre_main, 0);
    }
    if (order == "reverse") std::reverse(turn.begin(), turn.end());
    std::size_t left = fibres.size();
    switches = 0;
    while (left > 0) {
        if (order == "random") std::shuffle(turn.begin(), turn.end(), random);
        for (const int i : turn) {
            Fibre& fibre = fibres[static_cast<std::size_t>(i)];
            if (fibre.done) continue;
            current_fibre = &fibre;
            current_indices = &fibre.indices;
            // Everyone waits, and nobody can come: a barrier that some threads do not reach.
            if (++switches > 8 * static_cast<long>(fibres.size()) + 64) fail("a barrier is not reached by all threads");
            swapcontext(&scheduler, &fibre.context);
            if (fibre.done) --left;
        }
    }
}
#endif

}  // namespace

Indices& indices() {
#ifdef DIFFUPOSE_EMULATE_THREADS
    return current_indices;
#else
    return *current_indices;
#endif
}

unsigned char* shared_memory() {
    // Aligned as on the GPU.
    return block.shared.data() + (-reinterpret_cast<uintptr_t>(block.shared.data()) & 127);
}

namespace {
template <bool Orders>
void wait(Barrier<Orders>& barrier, int expected) {
    barrier.wait(expected);
#ifndef DIFFUPOSE_EMULATE_THREADS
    switches = 0;
#endif
}
}  // namespace

void sync_threads() { wait(block.barrier, block.count); }

void sync_warp(uint32_t mask) { wait(warp().barrier, count_bits(mask)); }

void exchange(uint32_t mask, const uint32_t* mine, int words, WarpWords& all) {
    Warp& w = warp();
    const int me = lane(), count = count_bits(mask);
    for (int i = 0; i < words; ++i) w.words[me][i].store(mine[i], std::memory_order_relaxed);
    wait(w.before, count);
    for (int other = 0; other < kWarp; ++other) {
        for (int i = 0; i < words; ++i) all[other][i] = w.words[other][i].load(std::memory_order_relaxed);
    }
    wait(w.after, count);
}

void launch(dim3 grid, dim3 dims, int shared_bytes, const std::function<void()>& kernel) {
    const unsigned threads = dims.x * dims.y * dims.z;
    if (threads < 1 || threads > 1024) fail("a block has 1 to 1024 threads, got " + std::to_string(threads));
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) fail("a grid has at least one block");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid has 65535 blocks at most in y and z");
    if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
        fail("dynamic shared memory of " + std::to_string(shared_bytes) + " bytes");
    }
    block.count = static_cast<int>(threads);
    block.warps.clear();
    for (unsigned i = 0; i < (threads + kWarp - 1) / kWarp; ++i) block.warps.push_back(std::make_unique<Warp>());
    block.shared.resize(static_cast<std::size_t>(shared_bytes) + 256);
#ifndef DIFFUPOSE_EMULATE_THREADS
    // Stacks are reused: large kernels keep arrays in registers that here lie on the stack.
    static std::vector<Fibre> fibres;
    if (fibres.size() != threads) fibres = std::vector<Fibre>(threads);
    for (Fibre& fibre : fibres) fibre.stack.resize(128 << 10);
#endif
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block.barrier.reset(block.count);
                // What a block does not write it must not read: shared memory begins as NaN in every type.
                std::fill(block.shared.begin(), block.shared.end(), static_cast<unsigned char>(0xff));
#ifdef DIFFUPOSE_EMULATE_THREADS
                std::vector<std::thread> all;
                for (int i = 0; i < block.count; ++i) {
                    all.emplace_back([&, i] {
                        current_indices = indices_of(grid, dims, dim3(x, y, z), i);
                        kernel();
                    });
                }
                for (std::thread& thread : all) thread.join();
#else
                run_block(grid, dims, dim3(x, y, z), kernel, fibres);
#endif
            }
        }
    }
}

}  // namespace diffupose::emulation
