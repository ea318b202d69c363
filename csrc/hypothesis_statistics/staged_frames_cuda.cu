#include "common/cuda.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"
#include "hypothesis_statistics/seen_frame.h"
#include "hypothesis_statistics/staged_frames.cuh"
#include "hypothesis_statistics/staged_frames_cuda.h"

namespace diffupose {
namespace {

// A thread block takes a few frames and copies all their hypotheses to shared memory, once. An item is a joint of a
// frame. A thread sums over the hypotheses of its item. If there are more threads than items, several threads share an
// item, and each sums over every n-th hypothesis.

// Calls function(joint, hypothesis) for an item's hypotheses.
template <typename Function>
__device__ __forceinline__ void for_each(const Block& block, const Item& item, const Function& function) {
    if (!item.real) return;
    const int stride = item.step * block.row;
    const float* joint = item.poses + item.first * block.row;
    int h = item.first;
#pragma unroll 1
    for (; h + 3 * item.step < block.count; h += 4 * item.step, joint += 4 * stride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) function(joint + i * stride, h + i * item.step);
    }
#pragma unroll 1
    for (; h < block.count; h += item.step, joint += stride) function(joint, h);
}

// The mean of a few of an item's hypotheses. The sums below are over differences from it, so that sums of squares lose
// no digits. It is computed in differences from the first hypothesis: equal hypotheses have exactly this mean.
__device__ __forceinline__ void shift_of(const Block& block, const Item& item, const Plan& plan, float (&shift)[3]) {
    const float* joint = item.poses;
    const int stride = plan.apart * block.row;
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

// Adds the parts of each item's sums, which lie kBlock apart, into the first one. All have been written.
__device__ __forceinline__ void join(const Plan& plan, int items, float* sums, int count) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count * items; i += kBlock) {
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

template <bool kView, typename T>
__global__ void __launch_bounds__(kBlock, kView ? 4 : 6)
    staged_frames_kernel(const float* __restrict__ hypotheses, CudaReprojection view, StatisticsOutputs outputs,
                         HypothesisSizes sizes, Plan plan) {
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * plan.frames;
    const Block block(plan, sizes, first, memory);
    const Item item(block, plan);
    const int thread = static_cast<int>(threadIdx.x), items = block.frames * block.joints, parts = plan.parts;
    read_poses(block, hypotheses + first * sizes.num_hypotheses * sizes.num_joints * 3);
    if constexpr (kView) look<T>(block, item, view, first);  // in the meantime
    wait_for_copies();
    __syncthreads();

    float shift[3] = {};
    if (item.real && item.first == 0) {
        shift_of(block, item, plan, shift);
        for (int axis = 0; axis < 3 && parts > 1; ++axis) block.shifts[axis * items + item.own] = shift[axis];
    }
    if constexpr (kView) {
        place(block, plan.per_count);
        __syncthreads();
        float* weights = outputs.weights + first * sizes.num_hypotheses;
        if (block.frames > 8) {
            weigh<4>(block, weights);
        } else {
            weigh<32>(block, weights);
        }
    }
    if (kView || parts > 1) __syncthreads();
    if (parts > 1 && item.real) {
        for (int axis = 0; axis < 3; ++axis) shift[axis] = block.shifts[axis * items + item.own];
    }

    // Sums 0 to 8, for the moments: differences from the shift, and their products. Sums 9 to 17, for the view: the
    // joint's distance from its keypoint in the image, in focal lengths, and its square; the weighted depth; the
    // weighted distance from the viewing ray, in metres; the weighted position in the hypotheses that cannot be placed.
    constexpr int kSums = kView ? kMomentSums + kViewSums : kMomentSums;
    float sums[kSums] = {};
    float4 ray = {};
    if constexpr (kView) {
        if (item.real) ray = block.rays[item.own];
    }
    for_each(block, item, [&](const float* pose, [[maybe_unused]] int h) {
        const float x = pose[0] - shift[0], y = pose[1] - shift[1], z = pose[2] - shift[2];
        sums[0] += x, sums[1] += y, sums[2] += z;
        sums[3] += x * x, sums[4] += y * y, sums[5] += z * z;
        sums[6] += x * y, sums[7] += y * z, sums[8] += x * z;
        if constexpr (kView) {
            const float4 root = block.roots[item.frame * block.count + h];
            const float depth = pose[2] + root.z;
            const float off_x = pose[0] + root.x - ray.x * depth, off_y = pose[1] + root.y - ray.y * depth;
            const float inverse = nearly_inverse(depth);
            const float q_x = off_x * inverse, q_y = off_y * inverse;
            sums[9] += q_x, sums[10] += q_y, sums[11] += q_x * q_x, sums[11] += q_y * q_y;
            if (root.z == root.z) sums[12] += root.w * pose[2], sums[13] += root.w * off_x, sums[14] += root.w * off_y;
        }
    });
    if constexpr (kView) {
        if (item.real && block.kept[item.frame].lost > 0.0f) {
            for_each(block, item, [&](const float* pose, int h) {
                const float4 root = block.roots[item.frame * block.count + h];
                for (int axis = 0; root.z != root.z && axis < 3; ++axis) sums[15 + axis] += root.w * pose[axis];
            });
        }
    }
    __syncthreads();  // the poses are done with
    if (parts > 1) {
        for (int i = 0; i < kSums; ++i) block.poses[i * kBlock + thread] = sums[i];
        __syncthreads();
        join(plan, items, block.poses, kSums);
        __syncthreads();
        for (int i = 0; i < kSums; ++i) sums[i] = block.poses[i * kBlock + item.own];
    }

    const bool writes = item.real && item.first == 0;
    const float share = plan.per_count;
    float refined[3] = {};
    if constexpr (kView) {
        const float mean_x = sums[9] * share, mean_y = sums[10] * share;
        const float offset = mean_x * mean_x + mean_y * mean_y, spread = sums[11] * share - offset;
        if (writes) block.offsets[item.own] = offset;
        __syncthreads();
        average_offsets(block);
        __syncthreads();
        if (writes) {
            // A joint moves S / (S + R) of the way to its ray, see SeenJoint::trust.
            const SharedFrame& kept = block.kept[item.frame];
            const float variance = spread < 0.0f ? 0.0f : spread;  // NaN stays NaN
            const float trust = variance / (variance + (offset > kept.usual ? offset : kept.usual));
            const float rest = 1.0f - (std::isfinite(trust) ? ray.w * trust : 0.0f);
            const float far = sums[12] + kept.root_depth;
            // No hypothesis of the frame is placed where a ray is no number.
            refined[0] = rest * sums[13] + (std::isfinite(ray.x) ? ray.x * far : 0.0f);
            refined[1] = rest * sums[14] + (std::isfinite(ray.y) ? ray.y * far : 0.0f);
            refined[2] = sums[12];
            if (item.joint == 0) {
                for (int axis = 0; axis < 3; ++axis) block.bases[3 * item.frame + axis] = refined[axis];
            }
        }
        __syncthreads();
    }

    // The covariances go to shared memory first, behind the partial sums, and from there to memory together: each
    // thread would need nine accesses for its own. Means are written directly.
    float* matrices = block.poses + numbers_of_results(0, parts);
    const int64_t at = first * block.joints;
    if (writes) {
        const float x = sums[0] * share, y = sums[1] * share, z = sums[2] * share, below = plan.per_degree;
        const float xx = (sums[3] - sums[0] * x) * below, yy = (sums[4] - sums[1] * y) * below;
        const float zz = (sums[5] - sums[2] * z) * below, xy = (sums[6] - sums[0] * y) * below;
        const float yz = (sums[7] - sums[1] * z) * below, xz = (sums[8] - sums[0] * z) * below;
        const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
        for (int i = 0; i < 9; ++i) matrices[9 * item.own + i] = matrix[i];
        float* mean = outputs.mean + 3 * (at + item.own);
        mean[0] = shift[0] + x, mean[1] = shift[1] + y, mean[2] = shift[2] + z;
        if constexpr (kView) {
            const float* base = block.bases + 3 * item.frame;
            float* moved = outputs.weighted_mean + 3 * (at + item.own);
            for (int axis = 0; axis < 3; ++axis) moved[axis] = refined[axis] - base[axis] + sums[15 + axis];
        }
    }
    __syncthreads();
    write(outputs.covariance + 9 * at, matrices, 9 * block.here * block.joints);
}

template <bool kView, typename T>
void launch(const float* hypotheses, const CudaReprojection& view, const StatisticsOutputs& outputs,
            const HypothesisSizes& sizes, const Plan& plan, void* stream) {
    const auto kernel = staged_frames_kernel<kView, T>;
    if (plan.end > 48 << 10) allow_shared_bytes(kernel, plan.end);
    const int64_t blocks = (sizes.num_frames + plan.frames - 1) / plan.frames;
    DIFFUPOSE_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, plan.end, stream, hypotheses, view, outputs, sizes,
                     plan);
    check_launch("staged_frames");
}

}  // namespace

bool launch_staged_frames_cuda(const float* hypotheses, const CudaReprojection& view, const StatisticsOutputs& outputs,
                               HypothesisSizes sizes, void* stream) {
    const Plan plan = plan_of(sizes, view.keypoints_2d != nullptr);
    if (plan.end == 0) return false;
    if (view.keypoints_2d == nullptr) {
        launch<false, float>(hypotheses, view, outputs, sizes, plan, stream);
    } else if (view.float64) {
        launch<true, double>(hypotheses, view, outputs, sizes, plan, stream);
    } else {
        launch<true, float>(hypotheses, view, outputs, sizes, plan, stream);
    }
    return true;
}

}  // namespace diffupose
