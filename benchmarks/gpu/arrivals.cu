// What racecheck says of kernels without a race, by how two groups of their threads pass turns to each other:
//
//   nvcc -arch=native arrivals.cu -o arrivals && compute-sanitizer --tool racecheck ./arrivals CASE
//
// In all of them a __syncthreads() lies between each store to shared memory and the loads of other threads. `barriers`
// are those of the engine's persistent kernel for Hopper, which one group arrives at and the other waits at: hazards
// there are the tool's own. With `mbarriers`, and with `none`, it has none.
#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 256, kGroup = 128, kSteps = 8;

enum class Turns { none, barriers, mbarriers };

// How many turns there are in each step.
struct Pattern {
    int turns[kSteps];
};

// Turn `turn` is the group's turn % 2. There are two barriers, or two mbarriers, whose phases alternate.
template <Turns kTurns>
__device__ void wait_for(unsigned turn, unsigned mbarriers) {
    if constexpr (kTurns == Turns::barriers) {
        asm volatile("bar.sync %0, %1;\n" ::"r"(1 + turn % 2), "n"(kThreads) : "memory");
    }
    if constexpr (kTurns == Turns::mbarriers) {
        asm volatile(
            "{\n.reg .pred done;\nagain%=:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra "
            "again%=;\n}\n" ::"r"(mbarriers + 8 * (turn % 2)),
            "r"(turn / 2 % 2)
            : "memory");
    }
}

template <Turns kTurns>
__device__ void arrive_at(unsigned turn, unsigned mbarriers) {
    if constexpr (kTurns == Turns::barriers) {
        asm volatile("bar.arrive %0, %1;\n" ::"r"(1 + turn % 2), "n"(kThreads) : "memory");
    }
    if constexpr (kTurns == Turns::mbarriers) {
        asm volatile(
            "{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(mbarriers + 8 * (turn % 2))
            : "memory");
    }
}

template <Turns kTurns>
__global__ void __launch_bounds__(kThreads) exchange_kernel(int* out, Pattern pattern) {
    __shared__ int memory[kThreads];
    __shared__ alignas(8) unsigned long long phases[2];
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned group = threadIdx.x / kGroup, mbarriers = static_cast<unsigned>(__cvta_generic_to_shared(phases));
    if (thread < 2) asm volatile("mbarrier.init.shared.b64 [%0], 128;\n" ::"r"(mbarriers + 8 * threadIdx.x) : "memory");
    __syncthreads();
    int sum = 0;
    unsigned before = 0;
    if (group == 1) arrive_at<kTurns>(0, mbarriers);
    for (int step = 0; step < kSteps; ++step) {
        const auto turns = static_cast<unsigned>(pattern.turns[step]);
        for (unsigned turn = (before + group) % 2; turn < turns; turn += 2) {
            wait_for<kTurns>(before + turn, mbarriers);
            arrive_at<kTurns>(before + turn + 1, mbarriers);
        }
        before += turns;
        memory[thread] = step * thread;
        __syncthreads();
        sum += memory[kThreads - 1 - thread];
        __syncthreads();
    }
    if (before % 2 == group) wait_for<kTurns>(before, mbarriers);  // the turn that nobody took
    out[thread] = sum;
}

constexpr Pattern kPatterns[] = {
    {1, 1, 1, 1, 1, 1, 1, 1}, {2, 2, 2, 2, 2, 2, 2, 2}, {1, 2, 1, 2, 1, 2, 1, 2},
    {1, 3, 1, 2, 1, 5, 1, 1}, {3, 3, 3, 3, 3, 3, 3, 3},
};

constexpr int kCount = sizeof(kPatterns) / sizeof(kPatterns[0]), kTimes = 4;

template <Turns kTurns>
int run() {
    int *out = nullptr, values[kThreads], wrong = 0;
    cudaMalloc(&out, sizeof(values));
    // What the tool reports differs from one time to the next.
    for (int i = 0; i < kTimes * kCount; ++i) {
        const Pattern& pattern = kPatterns[i % kCount];
        cudaMemset(out, 0, sizeof(values));
        exchange_kernel<kTurns><<<1, kThreads>>>(out, pattern);
        cudaMemcpy(values, out, sizeof(values), cudaMemcpyDeviceToHost);
        for (int t = 0; t < kThreads; ++t) wrong += values[t] != (kThreads - 1 - t) * (kSteps * (kSteps - 1) / 2);
    }
    const cudaError_t error = cudaGetLastError();
    std::printf("%s, %d wrong\n", cudaGetErrorString(error), wrong);
    cudaFree(out);
    return error != cudaSuccess || wrong != 0;
}

}  // namespace

int main(int count, char** arguments) {
    const char* name = count == 2 ? arguments[1] : "";
    if (std::strcmp(name, "none") == 0) return run<Turns::none>();
    if (std::strcmp(name, "barriers") == 0) return run<Turns::barriers>();
    if (std::strcmp(name, "mbarriers") == 0) return run<Turns::mbarriers>();
    std::printf("arrivals none|barriers|mbarriers\n");
    return 2;
}
