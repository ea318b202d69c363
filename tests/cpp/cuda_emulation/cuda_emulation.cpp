#include "cuda_emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "emulated_blocks.h"

namespace diffupose::emulation {
namespace {

int flat_thread() {
    const Indices& at = indices();
    return static_cast<int>(at.thread.x + at.block_dim.x * (at.thread.y + at.block_dim.y * at.thread.z));
}

Block& block() { return *cluster->blocks[static_cast<std::size_t>(indices().in_cluster)]; }

Warp& warp() { return *block().warps[static_cast<std::size_t>(flat_thread() / kWarp)]; }

// The lanes of a mask that there are: the last warp of a block may be a part of one.
uint32_t existing(uint32_t mask) {
    const int lanes = std::min(block().count - flat_thread() / kWarp * kWarp, kWarp);
    return mask & (0xffffffffu >> (kWarp - lanes));
}

// Who comes to a barrier of a warp, and which of its barriers it is.
struct Party {
    int count, first;
};

Party party_of(uint32_t mask) {
    if ((mask >> lane() & 1u) == 0) fail("a thread is not in the mask that it gives");
    return {__builtin_popcount(existing(mask)), __builtin_ctz(mask)};
}

}  // namespace

void fail(const std::string& message) {
    std::fprintf(stderr, "CUDA emulation: %s\n", message.c_str());
    std::abort();
}

Launches& launches() {
    static Launches all;
    return all;
}

unsigned char* shared_memory() { return block().shared.data(); }

// Where in the shared memory of another block lies what is here in that of this one.
static unsigned char* shared_memory_of(int block_in_cluster, void* here) {
    if (block_in_cluster < 0 || block_in_cluster >= static_cast<int>(cluster->blocks.size())) {
        fail("there is no block " + std::to_string(block_in_cluster) + " in the cluster");
    }
    const auto offset = static_cast<unsigned char*>(here) - shared_memory();
    return cluster->blocks[static_cast<std::size_t>(block_in_cluster)]->shared.data() + offset;
}

void Mailbox::open() {
    missing_.store(kUnsaid, std::memory_order_relaxed);
    times_.store(0, std::memory_order_relaxed);
    waiting_.store(0, std::memory_order_relaxed);
}

void Mailbox::add(int count) {
    if (missing_.fetch_add(count, std::memory_order_acq_rel) + count != 0) return;
    missing_.store(kUnsaid, std::memory_order_relaxed);
    times_.fetch_add(1, std::memory_order_release);
#ifndef DIFFUPOSE_EMULATE_THREADS
    idle.fetch_sub(waiting_.exchange(0, std::memory_order_relaxed), std::memory_order_relaxed);
#endif
    wake_threads(times_);
}

void Mailbox::expect(int bytes) { add(bytes - kUnsaid); }

void Mailbox::come(int bytes) { add(-bytes); }

void Mailbox::wait(unsigned times) {
    if (times_.load(std::memory_order_acquire) > times) return;
    idle.fetch_add(1, std::memory_order_relaxed);
    waiting_.fetch_add(1, std::memory_order_relaxed);
    while (times_.load(std::memory_order_acquire) <= times) pause_thread(times_, times);
#ifdef DIFFUPOSE_EMULATE_THREADS
    idle.fetch_sub(1, std::memory_order_relaxed);
#endif
}

void send(int block_in_cluster, void* here, const void* from, int bytes, Mailbox& mailbox) {
    std::memcpy(shared_memory_of(block_in_cluster, here), from, static_cast<std::size_t>(bytes));
    reinterpret_cast<Mailbox*>(shared_memory_of(block_in_cluster, &mailbox))->come(bytes);
}

void sync_cluster() { cluster->barrier.wait(cluster->count); }

void copy_async(void* to, const void* from, int bytes) { indices().copies.push_back({to, from, bytes}); }

void wait_for_copies() {
    for (const Copy& copy : indices().copies) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
    indices().copies.clear();
}

int lane() { return flat_thread() % kWarp; }

void require_lane(uint32_t mask, int source) {
    if (source < 0 || source >= kWarp || (existing(mask) >> source & 1u) == 0) {
        fail("lane " + std::to_string(source) + " takes no part in an exchange");
    }
}

void sync_threads() { block().barrier.wait(block().count); }

NamedBarrier& named_barrier(int number, int count) {
    if (number < 1 || number >= kBarriers) fail("there is no barrier " + std::to_string(number));
    if (count % kWarp != 0 || count > block().count) fail("a barrier of " + std::to_string(count) + " threads");
    return block().named[number];
}

void sync_barrier(int barrier, int count) { named_barrier(barrier, count).come(count, true); }

void arrive_at_barrier(int barrier, int count) { named_barrier(barrier, count).come(count, false); }

void sync_warp(uint32_t mask) {
    const Party party = party_of(mask);
    warp().barriers[party.first].wait(party.count);
}

void exchange(uint32_t mask, const uint32_t* mine, int words, WarpWords& all) {
    Warp& w = warp();
    const Party party = party_of(mask);
    const int me = lane();
    for (int i = 0; i < words; ++i) w.words[me][i].store(mine[i], std::memory_order_relaxed);
    w.before[party.first].wait(party.count);
    for (int other = 0; other < kWarp; ++other) {
        for (int i = 0; i < words; ++i) all[other][i] = w.words[other][i].load(std::memory_order_relaxed);
    }
    w.after[party.first].wait(party.count);
}

void require_wait() {
    if (!indices().waited) fail("a kernel that is launched early ends without having waited");
}

void require_aligned(const void* address, int bytes) {
    if (reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes) != 0) {
        fail("an address is not a multiple of " + std::to_string(bytes));
    }
}

void launch(const char* name, const char* file, dim3 grid, dim3 dims, int shared_bytes,
            const std::function<void()>& kernel, int cluster_blocks) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    const unsigned threads = dims.x * dims.y * dims.z;
    if (threads < 1 || threads > 1024) fail("a block has 1 to 1024 threads, got " + std::to_string(threads));
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) fail("a grid has at least one block");
    const bool whole = grid.x % static_cast<unsigned>(cluster_blocks) == 0;
    if (cluster_blocks < 1 || cluster_blocks > 8 || (cluster_blocks > 1 && (grid.y > 1 || grid.z > 1 || !whole))) {
        fail("a grid that is not of whole clusters of 1 to 8 blocks");
    }
    if (grid.y > 65535 || grid.z > 65535) fail("a grid has 65535 blocks at most in y and z");
    if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
        fail("dynamic shared memory of " + std::to_string(shared_bytes) + " bytes");
    }
    Launched& launched = launches()[{name, file}];
    launched.threads = std::max(launched.threads, static_cast<int>(threads));
    launched.shared_bytes = std::max(launched.shared_bytes, shared_bytes);
    cluster = std::make_unique<Cluster>();
    for (int i = 0; i < cluster_blocks; ++i) {
        cluster->blocks.push_back(std::make_unique<Block>(static_cast<int>(threads), shared_bytes));
    }
    cluster->count = cluster_blocks * static_cast<int>(threads);
    idle.store(0, std::memory_order_relaxed);
    run_grid(grid, dims, static_cast<unsigned>(cluster_blocks), kernel);
}

}  // namespace diffupose::emulation
