// Threads that run one function together, and a barrier for them.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#if defined(_OPENMP) && !defined(DIFFUPOSE_STD_THREADS)
#include <omp.h>
#define DIFFUPOSE_OPENMP 1
#endif

namespace diffupose {

// Calls function(index, count) on `count` threads, at most `wanted`. Index 0 is the caller's thread.
template <typename Function>
void parallel(int wanted, const Function& function) {
    if (wanted <= 1) {
        function(0, 1);
        return;
    }
#ifdef DIFFUPOSE_OPENMP
#pragma omp parallel num_threads(wanted)
    function(omp_get_thread_num(), omp_get_num_threads());
#else
    std::vector<std::thread> others;
    for (int i = 1; i < wanted; ++i) others.emplace_back([&, i] { function(i, wanted); });
    function(0, wanted);
    for (std::thread& other : others) other.join();
#endif
}

// Waits by spinning, since layers take microseconds. After a while it yields the processor to other threads.
class Barrier {
   public:
    void wait(int count) {
        if (count == 1) return;
        const unsigned generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
            if (spins > 20000) std::this_thread::yield();
        }
    }

   private:
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> generation_{0};
};

}  // namespace diffupose
