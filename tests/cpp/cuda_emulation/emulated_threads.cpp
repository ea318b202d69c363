#include <sys/mman.h>
#include <ucontext.h>

#ifdef DIFFUPOSE_EMULATE_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <random>
#include <thread>

#include "emulated_blocks.h"

namespace diffupose::emulation {
namespace {

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

}  // namespace

#ifdef DIFFUPOSE_EMULATE_THREADS
// By the operating system's own call, of which ThreadSanitizer knows nothing: with a mutex here it would take all that
// threads wrote before for ordered, and hundreds of threads that spin would leave nothing for the others.
static void wait_for_change(const std::atomic<uint32_t>& number, uint32_t seen) {
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

namespace {

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

void run_cluster(dim3 grid, dim3 dims, dim3 at, std::vector<std::unique_ptr<Fibre> >& fibres) {
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
    static std::vector<std::unique_ptr<Fibre> > fibres;  // their stacks are used again
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

void run_grid(dim3 grid, dim3 dims, unsigned cluster_blocks, const std::function<void()>& kernel) {
    run_clusters(clusters_of(grid, cluster_blocks), grid, dims, kernel);
}

}  // namespace diffupose::emulation
