// What racecheck says of kernels without a race, by whether their threads also arrive at barriers without waiting:
//
//   nvcc -arch=native arrivals.cu -o arrivals && compute-sanitizer --tool racecheck ./arrivals CASE
//
// In all of them a __syncthreads() lies between each store to shared memory and the loads of other threads. Hazards in
// `registers` or `constants` only are the tool's own: it loses count of who has met at barrier 0.
#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 256, kGroup = 128, kSteps = 8;

// How two groups pass a turn to each other: not at all, or by barriers whose numbers are in registers, as in the
// engine's persistent kernel for Hopper, or are written into the instructions; each of them in every step, or, as there,
// one in a step.
enum class Turns { none, registers, constants, alternate };

template <Turns kTurns>
__device__ void take_turn(int group, int step) {
    if constexpr (kTurns == Turns::alternate) {
        if (group != step % 2) return;
        asm volatile("bar.sync %0, %1;\n" ::"r"(1 + group), "n"(kThreads) : "memory");
        asm volatile("bar.arrive %0, %1;\n" ::"r"(2 - group), "n"(kThreads) : "memory");
    }
    if constexpr (kTurns == Turns::registers) {
        asm volatile("bar.sync %0, %1;\n" ::"r"(1 + group), "n"(kThreads) : "memory");
        asm volatile("bar.arrive %0, %1;\n" ::"r"(2 - group), "n"(kThreads) : "memory");
    }
    if constexpr (kTurns == Turns::constants) {
        if (group == 0) {
            asm volatile("bar.sync 1, %0;\nbar.arrive 2, %0;\n" ::"n"(kThreads) : "memory");
        } else {
            asm volatile("bar.sync 2, %0;\nbar.arrive 1, %0;\n" ::"n"(kThreads) : "memory");
        }
    }
}

template <Turns kTurns>
__global__ void __launch_bounds__(kThreads) exchange_kernel(int* out) {
    __shared__ int memory[kThreads];
    const int thread = static_cast<int>(threadIdx.x), group = thread / kGroup;
    int sum = 0;
    if (kTurns != Turns::none && group == 1) asm volatile("bar.arrive 1, %0;\n" ::"n"(kThreads) : "memory");
    for (int step = 0; step < kSteps; ++step) {
        take_turn<kTurns>(group, step);
        __syncthreads();
        memory[thread] = step * thread;
        __syncthreads();
        sum += memory[kThreads - 1 - thread];
    }
    if (kTurns != Turns::none && group == 0) asm volatile("bar.sync 1, %0;\n" ::"n"(kThreads) : "memory");
    out[thread] = sum;
}

template <Turns kTurns>
int run() {
    int *out = nullptr, values[kThreads];
    cudaMalloc(&out, sizeof(values));
    exchange_kernel<kTurns><<<1, kThreads>>>(out);
    const cudaError_t error = cudaMemcpy(values, out, sizeof(values), cudaMemcpyDeviceToHost);
    int wrong = 0;
    for (int i = 0; i < kThreads; ++i) wrong += values[i] != (kThreads - 1 - i) * (kSteps * (kSteps - 1) / 2);
    std::printf("%s, %d wrong\n", cudaGetErrorString(error), wrong);
    cudaFree(out);
    return error != cudaSuccess || wrong != 0;
}

}  // namespace

int main(int count, char** arguments) {
    const char* name = count == 2 ? arguments[1] : "";
    if (std::strcmp(name, "none") == 0) return run<Turns::none>();
    if (std::strcmp(name, "registers") == 0) return run<Turns::registers>();
    if (std::strcmp(name, "constants") == 0) return run<Turns::constants>();
    if (std::strcmp(name, "alternate") == 0) return run<Turns::alternate>();
    std::printf("arrivals none|registers|constants|alternate\n");
    return 2;
}
