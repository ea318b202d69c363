#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#ifdef DIFFUPOSE_EMULATE_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
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

// Lets others run until a number may have changed, and wakes those who wait for that.
void pause_thread(const std::atomic<uint32_t>& number, uint32_t seen);
void wake_threads(const std::atomic<uint32_t>& number);

// Threads that wait at a barrier or have returned: when it is all of them, nobody can come. Relaxed, so that
// ThreadSanitizer takes nothing here for an order between them.
std::atomic<int> idle{0};

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

std::unique_ptr<Cluster> cluster;

#ifdef DIFFUPOSE_EMULATE_THREADS
thread_local Indices current_indices;
#else
// A fibre's stack, with a page at its end that nobody may touch: kernels keep large arrays in what are registers on a
// GPU, and sanitizers make frames larger.
class Stack {
   public:
    Stack() : memory_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0)) {
        if (memory_ == MAP_FAILED || mprotect(memory_, kGuard, PROT_NONE) != 0) fail("no memory for a stack");
    }
    ~Stack() { munmap(memory_, kBytes); }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;
    stack_t get() const { return {static_cast<char*>(memory_) + kGuard, 0, kBytes - kGuard}; }

   private:
    static constexpr std::size_t kBytes = 1 << 20, kGuard = 1 << 16;
    static constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory_;
};

struct Fibre {
    ucontext_t context;
    Stack stack;
    Indices indices;
    bool done = false;
};

ucontext_t scheduler;
Fibre* current_fibre = nullptr;
const std::function<void()>* current_kernel = nullptr;
#endif

#ifdef DIFFUPOSE_EMULATE_THREADS
// By the operating system's own call, of which ThreadSanitizer knows nothing: with a mutex here it would take all that
// threads wrote before for ordered, and hundreds of threads that spin would leave nothing for the others.
void wait_for_change(const std::atomic<uint32_t>& number, uint32_t seen) {
    const timespec while_nobody_comes = {0, 20'000'000};
    syscall(SYS_futex, &number, FUTEX_WAIT_PRIVATE, seen, &while_nobody_comes, nullptr, 0);
}
void pause_thread(const std::atomic<uint32_t>& number, uint32_t seen) {
    thread_local int times = 0;
    wait_for_change(number, seen);
    // Not at once: what one thread counts another may see a moment later.
    times = idle.load(std::memory_order_relaxed) == cluster->count ? times + 1 : 0;
    if (times > 10) fail("a barrier is not reached by all threads");
}
void wake_threads(const std::atomic<uint32_t>& number) {
    syscall(SYS_futex, &number, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void pause_thread(const std::atomic<uint32_t>&, uint32_t) { swapcontext(&current_fibre->context, &scheduler); }
void wake_threads(const std::atomic<uint32_t>&) {}
#endif

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

// Of a thread of the cluster that begins with a block.
Indices indices_of(dim3 grid, dim3 dims, dim3 at, int thread) {
    const unsigned count = dims.x * dims.y * dims.z, in_cluster = static_cast<unsigned>(thread) / count;
    const unsigned t = static_cast<unsigned>(thread) % count;
    Indices result;
    result.thread = dim3(t % dims.x, t / dims.x % dims.y, t / (dims.x * dims.y));
    result.block = dim3(at.x + in_cluster, at.y, at.z), result.block_dim = dims, result.grid_dim = grid;
    result.in_cluster = static_cast<int>(in_cluster);
    return result;
}

// Of the grid, one after the other: the first block of each cluster.
std::vector<dim3> clusters_of(dim3 grid, unsigned cluster_blocks) {
    std::vector<dim3> first;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += cluster_blocks) first.emplace_back(x, y, z);
        }
    }
    return first;
}

// Puts what takes turns in the order that DIFFUPOSE_EMULATION_ORDER names.
template <typename T>
void order(std::vector<T>& turns, bool first_time) {
    static const char* const given = std::getenv("DIFFUPOSE_EMULATION_ORDER");
    static const std::string name = given ? given : "forward";
    static std::mt19937 random(1);
    if (name == "random") {
        std::shuffle(turns.begin(), turns.end(), random);
    } else if (name == "reverse") {
        if (first_time) std::reverse(turns.begin(), turns.end());
    } else if (name != "forward") {
        fail("DIFFUPOSE_EMULATION_ORDER must be forward, reverse or random, got " + name);
    }
}

#ifdef DIFFUPOSE_EMULATE_THREADS
// Threads that stay for the next launch: to start one takes longer than most kernels.
class Pool {
   public:
    ~Pool() {
        count_ = 0;
        next_job();
        for (std::thread& thread : threads_) thread.join();
    }
    // Calls job(0) to job(count - 1), each on a thread of its own.
    void run(int count, const std::function<void(int)>& job) {
        count_ = count, job_ = &job;
        const uint32_t now = jobs_.load(std::memory_order_relaxed);
        while (static_cast<int>(threads_.size()) < count) {
            threads_.emplace_back([this, now, i = static_cast<int>(threads_.size())] { work(i, now); });
        }
        next_job();
        while (const uint32_t left = running_.load(std::memory_order_acquire)) wait_for_change(running_, left);
    }

   private:
    void next_job() {
        running_.store(static_cast<uint32_t>(threads_.size()), std::memory_order_relaxed);
        jobs_.fetch_add(1, std::memory_order_release);
        wake_threads(jobs_);
    }
    void work(int i, uint32_t seen) {
        for (;; ++seen) {
            while (jobs_.load(std::memory_order_acquire) == seen) wait_for_change(jobs_, seen);
            if (count_ == 0) return;
            if (i < count_) (*job_)(i);
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) wake_threads(running_);
        }
    }
    std::vector<std::thread> threads_;
    int count_ = 0;
    const std::function<void(int)>* job_ = nullptr;
    std::atomic<uint32_t> jobs_{0}, running_{0};
};

void run_clusters(const std::vector<dim3>& clusters, dim3 grid, dim3 dims, const std::function<void()>& kernel) {
    static Pool pool;
    Barrier<true> begin, end;
    pool.run(cluster->count, [&](int i) {
        for (const dim3& at : clusters) {
            if (i == 0) cluster->poison();
            begin.wait(cluster->count);
            current_indices = indices_of(grid, dims, at, i);
            kernel();
            end.wait(cluster->count);
            if (i == 0) cluster->require_no_arrivals();
        }
    });
}
#else
void fibre_main() {
    (*current_kernel)();
    current_fibre->done = true;
    idle.fetch_add(1, std::memory_order_relaxed);
    swapcontext(&current_fibre->context, &scheduler);
}

void begin(Fibre& fibre, const Indices& indices) {
    fibre.done = false;
    fibre.indices = indices;
    getcontext(&fibre.context);
    fibre.context.uc_stack = fibre.stack.get();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
    // Told the size, AddressSanitizer would clear what it knows of the whole stack at every switch.
    fibre.context.uc_stack.ss_size = 0;
}

void run_cluster(dim3 grid, dim3 dims, dim3 at, std::vector<std::unique_ptr<Fibre>>& fibres) {
    cluster->poison();
    idle.store(0, std::memory_order_relaxed);
    std::vector<Fibre*> turns;
    for (int i = 0; i < cluster->count; ++i) {
        turns.push_back(fibres[static_cast<std::size_t>(i)].get());
        begin(*turns.back(), indices_of(grid, dims, at, i));
    }
    for (bool first_time = true; !turns.empty(); first_time = false) {
        order(turns, first_time);
        for (Fibre* fibre : turns) {
            if (idle.load(std::memory_order_relaxed) == cluster->count) fail("a barrier is not reached by all threads");
            current_fibre = fibre;
            swapcontext(&scheduler, &fibre->context);
        }
        turns.erase(std::remove_if(turns.begin(), turns.end(), [](Fibre* fibre) { return fibre->done; }), turns.end());
    }
    cluster->require_no_arrivals();
}

void run_clusters(std::vector<dim3> clusters, dim3 grid, dim3 dims, const std::function<void()>& kernel) {
    static std::vector<std::unique_ptr<Fibre>> fibres;  // their stacks are used again
    while (static_cast<int>(fibres.size()) < cluster->count) fibres.push_back(std::make_unique<Fibre>());
    current_kernel = &kernel;
    order(clusters, true);
    for (const dim3& at : clusters) run_cluster(grid, dims, at, fibres);
}
#endif

}  // namespace

Indices& indices() {
#ifdef DIFFUPOSE_EMULATE_THREADS
    return current_indices;
#else
    return current_fibre->indices;
#endif
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

int64_t& most_blocks_together() {
    static int64_t blocks = 12;
    return blocks;
}

void end(const char* message) { fail(message); }

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
    run_clusters(clusters_of(grid, static_cast<unsigned>(cluster_blocks)), grid, dims, kernel);
}

}  // namespace diffupose::emulation
