#include "common/cuda.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"
#include "hypothesis_statistics/seen_frame.h"
#include "hypothesis_statistics/staged_frames_cuda.h"

namespace diffupose {
namespace {

// Frames with more hypotheses than staged_frames_cuda.cu takes.
//
// Each frame has a thread block. It reads the hypotheses about five times: once from memory, then from the caches (50
// poses of 17 joints are 10 KB). For sums over hypotheses, a thread takes one joint and every n-th hypothesis, so that
// the threads of a warp read neighbours; then one thread for each joint adds the partial sums in order. Work on whole
// poses takes a thread for each hypothesis.
constexpr int kBlock = 128, kMaxJoints = static_cast<int>(kCudaStatisticsMaxJoints), kSums = 6;
// Roots that shared memory holds. With more hypotheses, each pass computes the roots again.
constexpr int kRoots = 512;
static_assert(kRoots % kBlock == 0, "every pass must give a thread the same hypotheses");

struct Shared {
    SeenJoint seen[kMaxJoints];
    SeenFrame frame;
    float center[kMaxJoints][3];  // of a joint: its mean, then where it is seen
    float offsets[kMaxJoints];
    float sums[kBlock][kSums];
    float lowest[kBlock], totals[kBlock];
    float roots[kRoots][3];
};

// With a pointer that the compiler knows to be shared.
__device__ __forceinline__ SeenFrame in_shared(Shared& shared, SeenFrame frame) {
    frame.of = shared.seen;
    return frame;
}

struct Frame {
    const float* poses;  // [H, J, 3]
    int64_t count;       // H
    int joints;
    int joint, first, step;  // this thread sums over hypotheses first, first + step, ... of a joint; step 0: over none
};

// The sum over the partial sums of all threads with one joint.
__device__ __forceinline__ float sum_of(const Shared& shared, const Frame& frame, int joint, int which) {
    float sum = 0.0f;
    for (int i = joint; i < frame.joints * frame.step; i += frame.joints) sum += shared.sums[i][which];
    return sum;
}

template <int kCount>
__device__ __forceinline__ void leave(Shared& shared, const float (&sums)[kCount]) {
    for (int i = 0; i < kCount; ++i) shared.sums[threadIdx.x][i] = sums[i];
}

// Places the next kRoots hypotheses, from `first` on: their roots and, with kErrors, their errors.
template <bool kErrors>
__device__ __forceinline__ void place(Shared& shared, const SeenFrame& seen, const Frame& frame, int64_t first,
                                      float* errors) {
    if (first > 0) __syncthreads();  // those before have been read
    for (int i = static_cast<int>(threadIdx.x); i < kRoots && first + i < frame.count; i += kBlock) {
        const float* pose = frame.poses + (first + i) * frame.joints * 3;
        seen.place(pose, frame.joints, shared.roots[i]);
        if constexpr (kErrors) errors[first + i] = seen.error(pose, frame.joints, shared.roots[i]);
    }
    __syncthreads();
}

// Calls function(joint's pose, hypothesis, root) for this thread's hypotheses among those placed.
template <typename Function>
__device__ __forceinline__ void for_placed(const Shared& shared, const Frame& frame, int64_t first,
                                           const Function& function) {
    if (frame.step == 0) return;
    // kRoots is no multiple of the step: where the thread's hypotheses begin in these.
    int64_t h = frame.first + (first - frame.first + frame.step - 1) / frame.step * frame.step;
    for (; h < first + kRoots && h < frame.count; h += frame.step) {
        function(frame.poses + h * frame.joints * 3, h, shared.roots[h - first]);
    }
}

__device__ __forceinline__ void moments(Shared& shared, const Frame& frame, float* mean, float* covariance) {
    const int numel = 3 * frame.joints, thread = static_cast<int>(threadIdx.x);
    const float* own = frame.poses + 3 * frame.joint;
    // As in C++: differences from the first make the mean of equal hypotheses exact.
    float sums[3] = {}, products[kSums] = {};
    for (int64_t h = frame.first; frame.step > 0 && h < frame.count; h += frame.step) {
        for (int axis = 0; axis < 3; ++axis) sums[axis] += own[h * numel + axis] - own[axis];
    }
    leave(shared, sums);
    __syncthreads();
    if (thread < frame.joints) {
        for (int axis = 0; axis < 3; ++axis) {
            const float value =
                frame.poses[3 * thread + axis] + sum_of(shared, frame, thread, axis) / static_cast<float>(frame.count);
            shared.center[thread][axis] = mean[3 * thread + axis] = value;
        }
    }
    __syncthreads();
    const float* center = shared.center[frame.joint];
    for (int64_t h = frame.first; frame.step > 0 && h < frame.count; h += frame.step) {
        const float x = own[h * numel] - center[0], y = own[h * numel + 1] - center[1],
                    z = own[h * numel + 2] - center[2];
        products[0] += x * x, products[1] += y * y, products[2] += z * z;
        products[3] += x * y, products[4] += y * z, products[5] += x * z;
    }
    leave(shared, products);
    __syncthreads();
    if (thread < frame.joints) {
        float sixth[kSums];
        for (int i = 0; i < kSums; ++i) {
            const float sum = sum_of(shared, frame, thread, i);
            sixth[i] = frame.count < kMinHypotheses ? kNan : sum / static_cast<float>(frame.count - 1);
        }
        const auto [xx, yy, zz, xy, yz, xz] = sixth;
        const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
        for (int i = 0; i < 9; ++i) covariance[9 * thread + i] = matrix[i];
    }
}

// Errors of all hypotheses, and every joint's share of the way to its ray, see SeenJoint::trust. All threads see the
// shares after the next barrier.
__device__ __forceinline__ void judge(Shared& shared, SeenFrame& seen, const Frame& frame, float* errors) {
    const int thread = static_cast<int>(threadIdx.x), joint = frame.joint;
    float means[2] = {}, variance[1] = {};
    for (int64_t first = 0; first < frame.count; first += kRoots) {
        place<true>(shared, seen, frame, first, errors);
        for_placed(shared, frame, first, [&](const float* pose, int64_t, const float* root) {
            for (int axis = 0; axis < 2; ++axis) means[axis] += across(pose + 3 * joint, root, axis);
        });
    }
    leave(shared, means);
    __syncthreads();
    if (thread < frame.joints) {
        for (int axis = 0; axis < 2; ++axis) {
            shared.center[thread][axis] = sum_of(shared, frame, thread, axis) / static_cast<float>(frame.count);
        }
    }
    __syncthreads();
    for (int64_t first = 0; first < frame.count; first += kRoots) {
        if (frame.count > kRoots) place<false>(shared, seen, frame, first, nullptr);
        for_placed(shared, frame, first, [&](const float* pose, int64_t, const float* root) {
            const float x = across(pose + 3 * joint, root, 0) - shared.center[joint][0];
            const float y = across(pose + 3 * joint, root, 1) - shared.center[joint][1];
            variance[0] += x * x + y * y;
        });
    }
    leave(shared, variance);
    if (thread < frame.joints) {
        shared.offsets[thread] = seen.of[thread].offset(shared.center[thread][0], shared.center[thread][1]);
    }
    __syncthreads();
    if (thread < frame.joints) {
        float mean_offset = 0.0f, present = 0.0f;
        for (int j = 0; j < frame.joints; ++j) {
            if (seen.of[j].weight > 0.0f) mean_offset += shared.offsets[j], present += 1.0f;
        }
        const float spread = sum_of(shared, frame, thread, 0) / static_cast<float>(frame.count);
        seen.of[thread].trust(spread, shared.offsets[thread], mean_offset / present);
    }
}

// Errors become weights: exp(-error / (temperature side)) over their sum, or equal if no hypothesis can be placed. Each
// thread reads and writes its own hypotheses.
__device__ __forceinline__ void weigh(Shared& shared, float* errors, int64_t count, float scale) {
    const int thread = static_cast<int>(threadIdx.x);
    float lowest = kInfinity, total = 0.0f;
    for (int64_t h = thread; h < count; h += kBlock) {
        const float cost = errors[h] / scale, known = cost == cost ? cost : kInfinity;
        errors[h] = known;
        lowest = known < lowest ? known : lowest;
    }
    shared.lowest[thread] = lowest;
    __syncthreads();
    for (int i = 0; i < kBlock; ++i) lowest = shared.lowest[i] < lowest ? shared.lowest[i] : lowest;
    for (int64_t h = thread; h < count; h += kBlock) {
        errors[h] = lowest == kInfinity ? 1.0f : expf(lowest - errors[h]);
        total += errors[h];
    }
    shared.totals[thread] = total;
    __syncthreads();
    total = 0.0f;
    for (int i = 0; i < kBlock; ++i) total += shared.totals[i];
    for (int64_t h = thread; h < count; h += kBlock) errors[h] /= total;
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 4)
    hypothesis_statistics_kernel(const float* __restrict__ hypotheses, CudaReprojection view, StatisticsOutputs outputs,
                                 HypothesisSizes sizes) {
    __shared__ Shared shared;
    const int64_t b = blockIdx.x, count = sizes.num_hypotheses;
    const int joints = static_cast<int>(sizes.num_joints), thread = static_cast<int>(threadIdx.x);
    Frame frame = {
        hypotheses + b * count * joints * 3, count, joints, thread % joints, thread / joints, kBlock / joints};
    if (frame.first >= frame.step) frame.step = 0;  // left over
    const T* intrinsics = static_cast<const T*>(view.intrinsics) + (view.shared_camera ? 0 : 9 * b);
    const double camera[4] = {static_cast<double>(intrinsics[0]), static_cast<double>(intrinsics[4]),
                              static_cast<double>(intrinsics[2]), static_cast<double>(intrinsics[5])};
    SeenFrame seen = in_shared(shared, {});
    if (thread < joints) {
        const int64_t at = b * joints + thread;
        seen.of[thread].look(static_cast<const T*>(view.keypoints_2d) + 2 * at,
                             static_cast<const T*>(view.confidence)[at], camera, view.weight);
    }
    moments(shared, frame, outputs.mean + b * joints * 3, outputs.covariance + b * joints * 9);
    if (thread == 0) {
        seen.sum_up(camera, joints);
        shared.frame = seen;
    }
    __syncthreads();
    seen = in_shared(shared, shared.frame);
    float* errors = outputs.weights + b * count;
    judge(shared, seen, frame, errors);
    weigh(shared, errors, count, 2.0f * seen.half_side * view.temperature);
    __syncthreads();
    float refined[3] = {};
    for (int64_t first = 0; first < count; first += kRoots) {
        if (count > kRoots) place<false>(shared, seen, frame, first, nullptr);
        for_placed(shared, frame, first, [&](const float* pose, int64_t h, const float* root) {
            float base[3] = {},
                  moved[3] = {pose[3 * frame.joint], pose[3 * frame.joint + 1], pose[3 * frame.joint + 2]};
            if (is_placed(root)) {
                seen.of[0].move(pose, root, base);
                seen.of[frame.joint].move(pose + 3 * frame.joint, root, moved);
            }
            for (int axis = 0; axis < 3; ++axis) refined[axis] += errors[h] * (moved[axis] - base[axis]);
        });
    }
    leave(shared, refined);
    __syncthreads();
    if (thread < joints) {
        for (int axis = 0; axis < 3; ++axis) {
            outputs.weighted_mean[(b * joints + thread) * 3 + axis] = sum_of(shared, frame, thread, axis);
        }
    }
}

// Mean and covariance without a view: a thread for each joint of a frame. It takes eight hypotheses at a time, computes
// their mean and the products of differences from it, and joins these to the former ones (Chan et al. 1983), so that
// long sums lose no digits. All values are differences from the first hypothesis: equal hypotheses have exactly that
// mean and a covariance of zero.
__global__ void __launch_bounds__(kBlock) moments_kernel(const float* __restrict__ hypotheses, float* __restrict__ mean,
                                                         float* __restrict__ covariance, HypothesisSizes sizes) {
    constexpr int kPart = 8;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i >= sizes.num_frames * sizes.num_joints) return;
    const int64_t numel = 3 * sizes.num_joints, count = sizes.num_hypotheses;
    const float* own = hypotheses + i / sizes.num_joints * count * numel + i % sizes.num_joints * 3;
    const float first[3] = {own[0], own[1], own[2]};
    float means[3] = {}, products[kSums] = {};
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
            const float x = values[h][0] - center[0], y = values[h][1] - center[1], z = values[h][2] - center[2];
            products[0] += x * x, products[1] += y * y, products[2] += z * z;
            products[3] += x * y, products[4] += y * z, products[5] += x * z;
        }
        const float share = static_cast<float>(size) / static_cast<float>(begin + size);
        const float x = center[0] - means[0], y = center[1] - means[1], z = center[2] - means[2];
        const float both = static_cast<float>(begin) * share;
        products[0] += both * x * x, products[1] += both * y * y, products[2] += both * z * z;
        products[3] += both * x * y, products[4] += both * y * z, products[5] += both * x * z;
        means[0] += share * x, means[1] += share * y, means[2] += share * z;
    }
    for (int k = 0; k < 3; ++k) mean[3 * i + k] = first[k] + means[k];
    const float below = count < kMinHypotheses ? kNan : static_cast<float>(count - 1);
    for (int k = 0; k < kSums; ++k) products[k] /= below;
    const auto [xx, yy, zz, xy, yz, xz] = products;
    const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
    for (int k = 0; k < 9; ++k) covariance[9 * i + k] = matrix[k];
}

}  // namespace

void launch_hypothesis_statistics_cuda(const float* hypotheses, const CudaReprojection& view,
                                       const StatisticsOutputs& outputs, HypothesisSizes sizes, void* stream) {
    if (sizes.num_frames == 0 || launch_staged_frames_cuda(hypotheses, view, outputs, sizes, stream)) return;
    if (view.keypoints_2d == nullptr) {
        const int64_t blocks = (sizes.num_frames * sizes.num_joints + kBlock - 1) / kBlock;
        DIFFUPOSE_LAUNCH(moments_kernel, static_cast<unsigned>(blocks), kBlock, 0, stream, hypotheses, outputs.mean,
                         outputs.covariance, sizes);
        check_launch("moments_kernel");
        return;
    }
    const auto kernel = view.float64 ? hypothesis_statistics_kernel<double> : hypothesis_statistics_kernel<float>;
    DIFFUPOSE_LAUNCH(kernel, static_cast<unsigned>(sizes.num_frames), kBlock, 0, stream, hypotheses, view, outputs,
                     sizes);
    check_launch("hypothesis_statistics");
}

}  // namespace diffupose
