#include <cmath>

#include "common/cuda.h"
#include "common/cuda_copy.h"
#include "common/cuda_grid.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"

namespace diffupose {
namespace {

constexpr int kProducts = 6;  // xx, yy, zz, xy, yz, xz

__device__ __forceinline__ void add_products(float* products, float x, float y, float z) {
    products[0] += x * x, products[1] += y * y, products[2] += z * z;
    products[3] += x * y, products[4] += y * z, products[5] += x * z;
}

__device__ __forceinline__ void write_matrix(float* to, const float (&products)[kProducts]) {
    const auto [xx, yy, zz, xy, yz, xz] = products;
    const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
    for (int i = 0; i < 9; ++i) to[i] = matrix[i];
}

// --- Frames whose hypotheses fit the shared memory of a thread block -------------------------------------------------
//
// A thread block takes a few frames and copies all their hypotheses to shared memory, once. An item is a joint of a
// frame. A thread sums over the hypotheses of its item. If there are more threads than items, several threads share an
// item, and each sums over every n-th hypothesis.

constexpr int kBlock = 256;
// Sums of a thread: differences from a shift, and their products.
constexpr int kSums = 3 + kProducts;
// Two blocks fit a multiprocessor of any GPU that has 228 KiB of shared memory, one wherever there are 99 KiB.
constexpr int kMaxSharedBytes = 96 << 10;

// How the work is divided.
struct Plan {
    int frames, row;  // frames of a block; numbers between two hypotheses: odd, so that threads use different banks
    int parts;        // threads of an item
    int few, apart;   // number of hypotheses in the shift (see shift_of), and the distance between two of them
    float per_items, per_joints, per_count, per_few, per_degree;  // inverses; the last, of the degrees of freedom
    int shifts, matrices, bytes;  // where they begin in shared memory, in numbers; bytes is 0 if the frames do not fit
};

Plan plan_of(const HypothesisSizes& sizes) {
    const int joints = static_cast<int>(sizes.num_joints), numel = 3 * joints;
    Plan plan = {};
    if (sizes.num_hypotheses > kMaxSharedBytes / (12 * joints)) return plan;
    const int count = static_cast<int>(sizes.num_hypotheses), narrow = kBlock / joints;
    // Half as many hypotheses as threads; as many as threads if two frames have more than that.
    const int wanted = (count > kBlock / 4 ? kBlock : kBlock / 2) / count,
              staged = kMaxSharedBytes / 2 / (12 * joints * count);
    const int fitting = wanted < staged ? wanted : staged, most = fitting < 1 ? 1 : fitting < narrow ? fitting : narrow;
    // Every block should begin at a multiple of 16 bytes; four frames always do.
    const auto aligned = [&](int frames) { return frames * count * numel % 4 == 0; };
    plan.frames = most;
    while (plan.frames > 1 && !aligned(plan.frames)) --plan.frames;
    if (!aligned(plan.frames)) plan.frames = staged >= 4 && narrow >= 4 ? 4 : most;
    plan.row = numel | 1;
    const int items = plan.frames * joints;
    plan.parts = kBlock / items < count ? kBlock / items : count;
    // Sums of squares lose digits if the shift is far from the mean, relative to the spread, and if there are many.
    const int few = (count + 5) / 6, most_few = 8;
    plan.few = few < most_few ? few : most_few, plan.apart = count / plan.few;
    plan.per_items = 1.0f / static_cast<float>(items);
    plan.per_joints = 1.0f / static_cast<float>(joints);
    plan.per_count = 1.0f / static_cast<float>(count);
    plan.per_few = 1.0f / static_cast<float>(plan.few);
    plan.per_degree = count < kMinHypotheses ? NAN : 1.0f / static_cast<float>(count - 1);
    // The poses first. When they are done with, the partial sums take their place, and the matrices follow these.
    plan.matrices = plan.parts > 1 ? kSums * kBlock : 0;
    const int numbers = plan.frames * count * plan.row, results = plan.matrices + 9 * items;
    plan.shifts = ((numbers < results ? results : numbers) + 3) / 4 * 4;
    plan.bytes = 4 * (plan.shifts + (plan.parts > 1 ? 3 * items : 0));
    if (plan.bytes > kMaxSharedBytes) plan.bytes = 0;
    return plan;
}

// The work of a thread: the hypotheses first, first + step, ... of a joint of a frame.
struct Item {
    int own, first, step, count, row;
    bool real;
    const float* poses;  // of the frame's first hypothesis

    __device__ Item(const Plan& plan, const float* memory, int frames, int hypotheses, int joints) {
        const int thread = static_cast<int>(threadIdx.x);
        first = quotient_of(thread, plan.per_items), own = thread - first * plan.frames * joints;
        const int frame = quotient_of(own, plan.per_joints), joint = own - frame * joints;
        step = plan.parts, count = hypotheses, row = plan.row;
        real = frame < frames && first < step;
        poses = memory + frame * count * row + 3 * joint;
    }
};

// Copies poses to shared memory, a row apart, without waiting for them.
__device__ __forceinline__ void read_poses(float* to, const float* from, int poses, int numel, int row) {
    const int thread = static_cast<int>(threadIdx.x);
    if (row == numel && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        constexpr int kStep = 4 * kBlock;
        const int numbers = poses * numel, whole = numbers / 4 * 4;
        int i = 4 * thread;
#pragma unroll 1
        for (; i + kStep < whole; i += 2 * kStep) {
            copy_async<16>(to + i, from + i);
            copy_async<16>(to + i + kStep, from + i + kStep);
        }
        if (i < whole) copy_async<16>(to + i, from + i);
        if (whole + thread < numbers) copy_async<4>(to + whole + thread, from + whole + thread);
        return;
    }
#pragma unroll 1
    for (int h = thread / 32; h < poses; h += kBlock / 32) {
#pragma unroll 1
        for (int i = thread % 32; i < numel; i += 32) {
            copy_async<4>(to + h * row + i, from + static_cast<int64_t>(h) * numel + i);
        }
    }
}

// The mean of a few of an item's hypotheses. The sums are over differences from it, so that sums of squares lose no
// digits. It is computed in differences from the first hypothesis: equal hypotheses have exactly this mean.
__device__ __forceinline__ void shift_of(const Item& item, const Plan& plan, float (&shift)[3]) {
    const float* joint = item.poses;
    const int stride = plan.apart * item.row;
    float sum[3] = {};
#pragma unroll 1
    for (int h = 1; h < plan.few; ++h) {
        joint += stride;
        for (int axis = 0; axis < 3; ++axis) sum[axis] += joint[axis] - item.poses[axis];
    }
    for (int axis = 0; axis < 3; ++axis) {
        shift[axis] = item.poses[axis] + sum[axis] * plan.per_few;
        if (!std::isfinite(shift[axis])) shift[axis] = item.poses[axis];  // one is infinite: then so is the mean
    }
}

// Sums over a thread's hypotheses.
__device__ __forceinline__ void sum_up(const Item& item, const float (&shift)[3], float (&sums)[kSums]) {
    if (!item.real) return;
    const auto add = [&](const float* joint) {
        const float x = joint[0] - shift[0], y = joint[1] - shift[1], z = joint[2] - shift[2];
        sums[0] += x, sums[1] += y, sums[2] += z;
        add_products(sums + 3, x, y, z);
    };
    const int stride = item.step * item.row;
    const float* joint = item.poses + item.first * item.row;
    int h = item.first;
#pragma unroll 1
    for (; h + 3 * item.step < item.count; h += 4 * item.step, joint += 4 * stride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) add(joint + i * stride);
    }
#pragma unroll 1
    for (; h < item.count; h += item.step, joint += stride) add(joint);
}

// Adds the parts of each item's sums, which lie kBlock apart, into the first one. All have been written.
__device__ __forceinline__ void join(const Plan& plan, int items, float* sums) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kSums * items; i += kBlock) {
        const int which = quotient_of(i, plan.per_items);
        float* own = sums + which * kBlock + i - which * items;
        float sum = 0.0f;
#pragma unroll 4
        for (int part = 0; part < plan.parts; ++part) sum += own[part * items];
        own[0] = sum;
    }
}

// Copies numbers from shared memory to memory; neighbouring threads write neighbouring numbers.
__device__ __forceinline__ void write(float* to, const float* from, int count) {
    const int thread = static_cast<int>(threadIdx.x);
    int written = 0;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 == 0) {
        written = count / 4 * 4;
#pragma unroll 1
        for (int i = 4 * thread; i < written; i += 4 * kBlock) {
            *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
        }
    }
#pragma unroll 1
    for (int i = written + thread; i < count; i += kBlock) to[i] = from[i];
}

__global__ void __launch_bounds__(kBlock, 6) staged_frames_kernel(const float* __restrict__ hypotheses, float* mean,
                                                                  float* covariance, HypothesisSizes sizes, Plan plan) {
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    float* poses = reinterpret_cast<float*>(memory);
    float* shifts = poses + plan.shifts;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * plan.frames, left = sizes.num_frames - first;
    const int frames = static_cast<int>(left < plan.frames ? left : plan.frames);  // the last block may have fewer
    const int count = static_cast<int>(sizes.num_hypotheses), joints = static_cast<int>(sizes.num_joints);
    const Item item(plan, poses, frames, count, joints);
    const int items = plan.frames * joints, parts = plan.parts;
    const bool writes = item.real && item.first == 0;
    read_poses(poses, hypotheses + first * sizes.num_hypotheses * sizes.num_joints * 3, frames * count, 3 * joints,
               plan.row);
    wait_for_copies();
    __syncthreads();

    float shift[3] = {}, sums[kSums] = {};
    if (writes) {
        shift_of(item, plan, shift);
        for (int axis = 0; axis < 3 && parts > 1; ++axis) shifts[axis * items + item.own] = shift[axis];
    }
    if (parts > 1) __syncthreads();
    if (parts > 1 && item.real) {
        for (int axis = 0; axis < 3; ++axis) shift[axis] = shifts[axis * items + item.own];
    }
    sum_up(item, shift, sums);
    __syncthreads();  // the poses are done with
    if (parts > 1) {
        for (int i = 0; i < kSums; ++i) poses[i * kBlock + static_cast<int>(threadIdx.x)] = sums[i];
        __syncthreads();
        join(plan, items, poses);
        __syncthreads();
        for (int i = 0; i < kSums; ++i) sums[i] = poses[i * kBlock + item.own];
    }

    // The covariances go to shared memory first, and from there to memory together: each thread would need nine
    // accesses for its own. Means are written directly.
    float* matrices = poses + plan.matrices;
    const int64_t at = first * joints;
    if (writes) {
        const float share = plan.per_count, below = plan.per_degree;
        const float x = sums[0] * share, y = sums[1] * share, z = sums[2] * share;
        write_matrix(matrices + 9 * item.own, {(sums[3] - sums[0] * x) * below, (sums[4] - sums[1] * y) * below,
                                               (sums[5] - sums[2] * z) * below, (sums[6] - sums[0] * y) * below,
                                               (sums[7] - sums[1] * z) * below, (sums[8] - sums[0] * z) * below});
        float* own = mean + 3 * (at + item.own);
        own[0] = shift[0] + x, own[1] = shift[1] + y, own[2] = shift[2] + z;
    }
    __syncthreads();
    write(covariance + 9 * at, matrices, 9 * frames * joints);
}

// --- All other frames ------------------------------------------------------------------------------------------------

constexpr int kMomentsBlock = 128;

// A thread takes a joint of a frame, and eight hypotheses at a time. It computes their mean and the products of
// differences from it, and joins these to the former ones (Chan et al. 1983), so that long sums lose no digits. All
// values are differences from the first hypothesis: equal hypotheses have exactly that mean and a covariance of zero.
__global__ void __launch_bounds__(kMomentsBlock)
    moments_kernel(const float* __restrict__ hypotheses, float* __restrict__ mean, float* __restrict__ covariance,
                   HypothesisSizes sizes) {
    constexpr int kPart = 8;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kMomentsBlock + threadIdx.x;
    if (i >= sizes.num_frames * sizes.num_joints) return;
    const int64_t numel = 3 * sizes.num_joints, count = sizes.num_hypotheses;
    const float* own = hypotheses + i / sizes.num_joints * count * numel + i % sizes.num_joints * 3;
    const float first[3] = {own[0], own[1], own[2]};
    float means[3] = {}, products[kProducts] = {};
    for (int64_t begin = 0; begin < count; begin += kPart) {
        const int size = static_cast<int>(count - begin < kPart ? count - begin : kPart);
        float values[kPart][3], center[3] = {};
#pragma unroll
        for (int h = 0; h < kPart; ++h) {
            for (int k = 0; k < 3; ++k) {
                values[h][k] = h < size ? own[(begin + h) * numel + k] - first[k] : 0.0f;
                center[k] += values[h][k];
            }
        }
        for (int k = 0; k < 3; ++k) center[k] /= static_cast<float>(size);
#pragma unroll
        for (int h = 0; h < kPart; ++h) {
            if (h >= size) continue;
            add_products(products, values[h][0] - center[0], values[h][1] - center[1], values[h][2] - center[2]);
        }
        const float share = static_cast<float>(size) / static_cast<float>(begin + size);
        const float x = center[0] - means[0], y = center[1] - means[1], z = center[2] - means[2];
        const float both = static_cast<float>(begin) * share;
        products[0] += both * x * x, products[1] += both * y * y, products[2] += both * z * z;
        products[3] += both * x * y, products[4] += both * y * z, products[5] += both * x * z;
        means[0] += share * x, means[1] += share * y, means[2] += share * z;
    }
    for (int k = 0; k < 3; ++k) mean[3 * i + k] = first[k] + means[k];
    const float below = count < kMinHypotheses ? NAN : static_cast<float>(count - 1);
    for (int k = 0; k < kProducts; ++k) products[k] /= below;
    write_matrix(covariance + 9 * i, products);
}

}  // namespace

void launch_hypothesis_statistics_cuda(const float* hypotheses, float* mean, float* covariance, HypothesisSizes sizes,
                                       void* stream) {
    if (sizes.num_frames == 0) return;
    const Plan plan = plan_of(sizes);
    if (plan.bytes > 0) {
        if (plan.bytes > 48 << 10) allow_shared_bytes(staged_frames_kernel, plan.bytes);
        const int64_t blocks = (sizes.num_frames + plan.frames - 1) / plan.frames;
        DIFFUPOSE_LAUNCH(staged_frames_kernel, static_cast<unsigned>(blocks), kBlock, plan.bytes, stream, hypotheses,
                         mean, covariance, sizes, plan);
        check_launch("staged_frames_kernel");
        return;
    }
    const int64_t blocks = (sizes.num_frames * sizes.num_joints + kMomentsBlock - 1) / kMomentsBlock;
    DIFFUPOSE_LAUNCH(moments_kernel, static_cast<unsigned>(blocks), kMomentsBlock, 0, stream, hypotheses, mean,
                     covariance, sizes);
    check_launch("moments_kernel");
}

}  // namespace diffupose
