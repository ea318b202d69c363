// What emulated threads belong to, and what runs them: blocks, their barriers and clusters. For the emulation itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda_emulation.h"

namespace diffupose::emulation {

[[noreturn]] void fail(const std::string& message);

// Lets others run until a number may have changed, and wakes those who wait for that.
void pause_thread(const std::atomic<uint32_t>& number, uint32_t seen);
void wake_threads(const std::atomic<uint32_t>& number);

// Threads that wait at a barrier or have returned: when it is all of them, nobody can come. Relaxed, so that
// ThreadSanitizer takes nothing here for an order between them.
inline std::atomic<int> idle{0};

// A barrier; how much memory it orders is in the template argument.
template <bool Orders>
class Barrier {
   public:
    void wait(int expected) {
        constexpr auto both = Orders ? std::memory_order_acq_rel : std::memory_order_relaxed;
        constexpr auto load = Orders ? std::memory_order_acquire : std::memory_order_relaxed;
        constexpr auto store = Orders ? std::memory_order_release : std::memory_order_relaxed;
        const uint32_t passed = passed_.load(load);
        if (arrived_.fetch_add(1, both) + 1 == expected) {
            arrived_.store(0, std::memory_order_relaxed);
            idle.fetch_sub(expected - 1, std::memory_order_relaxed);
            passed_.store(passed + 1, store);
            wake_threads(passed_);
            return;
        }
        idle.fetch_add(1, std::memory_order_relaxed);
        while (passed_.load(load) == passed) pause_thread(passed_, passed);
    }

   private:
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> passed_{0};  // how often
};

// A barrier that some of the threads only arrive at.
class NamedBarrier {
   public:
    void come(int expected, bool waits) {
        const uint32_t passed = passed_.load(std::memory_order_acquire);
        if (waits) waiting_.fetch_add(1, std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == expected) {
            const int others = waiting_.exchange(0, std::memory_order_relaxed) - (waits ? 1 : 0);
            arrived_.store(0, std::memory_order_relaxed);
            idle.fetch_sub(others, std::memory_order_relaxed);
            passed_.store(passed + 1, std::memory_order_release);
            wake_threads(passed_);
            return;
        }
        if (!waits) return;
        idle.fetch_add(1, std::memory_order_relaxed);
        while (passed_.load(std::memory_order_acquire) == passed) pause_thread(passed_, passed);
    }
    bool arrived() const { return arrived_.load(std::memory_order_relaxed) != 0; }

   private:
    std::atomic<int> arrived_{0}, waiting_{0};
    std::atomic<uint32_t> passed_{0};  // how often
};

struct Warp {
    // By the first lane of the mask: parts of a warp that have no lane in common do not wait for each other.
    Barrier<true> barriers[kWarp];
    Barrier<false> before[kWarp], after[kWarp];  // of an exchange
    std::atomic<uint32_t> words[kWarp][kMaxWords];
};

// As long as it is said to be, so that AddressSanitizer sees what lies beyond, and aligned as on the GPU.
class SharedMemory {
   public:
    explicit SharedMemory(std::size_t bytes)
        : bytes_(bytes), data_(static_cast<unsigned char*>(::operator new(bytes, kAlign))) {}
    ~SharedMemory() { ::operator delete(data_, kAlign); }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    unsigned char* data() { return data_; }
    // What a block does not write it must not read: NaN in every type.
    void poison() { std::fill(data_, data_ + bytes_, static_cast<unsigned char>(0xff)); }

   private:
    static constexpr std::align_val_t kAlign{128};
    std::size_t bytes_;
    unsigned char* data_;
};

struct Block {
    Block(int threads, int shared_bytes) : shared(static_cast<std::size_t>(shared_bytes)), count(threads) {
        for (int i = 0; i < (threads + kWarp - 1) / kWarp; ++i) warps.push_back(std::make_unique<Warp>());
    }
    Barrier<true> barrier;
    NamedBarrier named[kBarriers];
    std::vector<std::unique_ptr<Warp>> warps;
    SharedMemory shared;
    int count;
};

// The blocks of a cluster; clusters run one after the other. Most are of one block.
struct Cluster {
    Barrier<true> barrier;
    std::vector<std::unique_ptr<Block>> blocks;
    int count = 0;  // of threads
    void poison() {
        for (const std::unique_ptr<Block>& block : blocks) block->shared.poison();
    }
    // Nobody is left who could come: an arrival that is still counted was one too many, or a wait is missing.
    void require_no_arrivals() const {
        for (const std::unique_ptr<Block>& block : blocks) {
            for (int i = 0; i < kBarriers; ++i) {
                if (block->named[i].arrived()) fail("threads arrived at barrier " + std::to_string(i) + " for nobody");
            }
        }
    }
};

// The one that runs.
inline std::unique_ptr<Cluster> cluster;

// Runs a kernel on all clusters of a grid, one after the other.
void run_grid(dim3 grid, dim3 dims, unsigned cluster_blocks, const std::function<void()>& kernel);

}  // namespace diffupose::emulation
