// Parts of staged_frames_cuda.cu: the layout of a block's shared memory, and the work on whole hypotheses: reading,
// placing and weighing them.
#pragma once

#include "common/cuda.h"
#include "common/cuda_copy.h"
#include "common/cuda_grid.h"
#include "common/cuda_nearly.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"
#include "hypothesis_statistics/seen_frame.h"

namespace diffupose {
namespace {

constexpr int kBlock = 256;
constexpr unsigned kAll = 0xffffffffu;
// Sums that a thread keeps over the hypotheses of its item, and the numbers of an item's covariance.
constexpr int kMomentSums = 9, kViewSums = 9, kResults = 9;
// Two blocks fit a multiprocessor of any GPU that has 228 KiB of shared memory, one wherever there are 99 KiB.
constexpr int kMaxSharedBytes = 96 << 10;

// What all hypotheses of a frame share.
struct SharedFrame {
    float mean_u, mean_v, inverse_total;
    float fy_over_fx, scale;  // cost = scale * error in units of fx
    float root_depth;         // weighted sum over the hypotheses that can be placed
    float lost;               // number of hypotheses that cannot be placed
    float usual;              // mean over joints of the squared distance between keypoint and hypotheses
};

// How a block's shared memory is divided, in bytes from its beginning.
struct Plan {
    int frames, row;  // frames of a block; numbers between two hypotheses: odd, so that threads use different banks
    int parts;        // threads of an item
    int few, apart;   // number of hypotheses in the shift (see shift_of), and the distance between two of them
    float per_items, per_joints, per_count, per_few, per_degree;  // inverses; the last, of the degrees of freedom
    int poses, shifts, roots, rays, slopes, exact, kept, offsets, bases, end;
};

__host__ __device__ inline int numbers_of_results(int items, int parts) {
    return (parts > 1 ? (kMomentSums + kViewSums) * kBlock : 0) + kResults * items;
}

inline Plan plan_of(const HypothesisSizes& sizes, bool view) {
    const int joints = static_cast<int>(sizes.num_joints), numel = 3 * joints;
    Plan plan = {};
    if (sizes.num_hypotheses > kMaxSharedBytes / (12 * joints)) return plan;
    const int count = static_cast<int>(sizes.num_hypotheses), narrow = kBlock / joints;
    // As many hypotheses as are placed at a time; twice as many if two frames have more than that.
    const int placed = (count > kBlock / 4 ? kBlock : kBlock / 2) / count,
              staged = kMaxSharedBytes / 2 / (12 * joints * count);
    const int fitting = placed < staged ? placed : staged, most = fitting < 1 ? 1 : fitting < narrow ? fitting : narrow;
    // Every block should begin at a multiple of 16 bytes; four frames always do.
    const auto aligned = [&](int frames) { return frames * count * numel % 4 == 0; };
    plan.frames = most;
    while (plan.frames > 1 && !aligned(plan.frames)) --plan.frames;
    if (!aligned(plan.frames)) plan.frames = staged >= 4 && narrow >= 4 ? 4 : most;
    plan.row = numel | 1;
    const int items = plan.frames * joints, hypotheses = plan.frames * count;
    plan.parts = kBlock / items < count ? kBlock / items : count;
    // Sums of squares lose digits if the shift is far from the mean, relative to the spread, and if there are many.
    const int few = (count + 5) / 6, most_few = 8;
    plan.few = few < most_few ? few : most_few, plan.apart = count / plan.few;
    plan.per_items = 1.0f / static_cast<float>(items);
    plan.per_joints = 1.0f / static_cast<float>(joints);
    plan.per_count = 1.0f / static_cast<float>(count);
    plan.per_few = 1.0f / static_cast<float>(plan.few);
    plan.per_degree = count < kMinHypotheses ? kNan : 1.0f / static_cast<float>(count - 1);
    int end = 0;
    const auto take = [&end](int bytes) {
        const int begin = end;
        end += (bytes + 15) / 16 * 16;
        return begin;
    };
    const int results = numbers_of_results(items, plan.parts), numbers = hypotheses * plan.row;
    plan.poses = take(4 * (numbers < results ? results : numbers));
    plan.shifts = take(plan.parts > 1 ? 12 * items : 0);
    if (view) {
        plan.roots = take(16 * hypotheses);
        plan.rays = take(16 * items);
        plan.slopes = take(8 * items);
        plan.exact = take(16 * items);
        plan.kept = take(static_cast<int>(sizeof(SharedFrame)) * plan.frames);
        plan.offsets = take(4 * items);
        plan.bases = take(12 * plan.frames);
    }
    plan.end = end <= kMaxSharedBytes ? end : 0;
    return plan;
}

struct alignas(16) ExactRay {
    double u, v;
};
struct alignas(8) Slope {
    float u, v;
};

// --- Arithmetic ------------------------------------------------------------------------------------------------------

// 1 / x to twice the digits of float32, by one Newton step.
__device__ __forceinline__ double inverse_of(double x) {
    const double near = static_cast<double>(nearly_inverse(static_cast<float>(x)));
    return near + near * (1.0 - x * near);
}

// The sum over kLanes neighbouring lanes, for each of them. All threads of the warp must call it.
template <int kLanes, typename T>
__device__ __forceinline__ T lanes_sum(T value) {
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAll, value, bits);
    return value;
}

template <int kLanes>
__device__ __forceinline__ float lanes_max(float value) {
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) {
        const float other = __shfl_xor_sync(kAll, value, bits);
        value = value < other ? other : value;
    }
    return value;
}

// --- The block, and what it does -------------------------------------------------------------------------------------

// The frames of a thread block, and where things lie in its shared memory.
struct Block {
    int frames, here, count, joints, row;  // here: frames of this block; the last block may have fewer
    float *poses, *shifts;
    float4* roots;  // x, y, z and the cost, later the weight
    float4* rays;   // u, v, confidence, and the part of the way to its ray that a joint may move
    Slope* slopes;  // change of the depth for each unit of distance from the rays
    ExactRay* exact;
    SharedFrame* kept;
    float *offsets, *bases;

    __device__ Block(const Plan& plan, const HypothesisSizes& sizes, int64_t first, unsigned char* memory)
        : frames(plan.frames),
          here(static_cast<int>(sizes.num_frames - first < plan.frames ? sizes.num_frames - first : plan.frames)),
          count(static_cast<int>(sizes.num_hypotheses)),
          joints(static_cast<int>(sizes.num_joints)),
          row(plan.row),
          poses(reinterpret_cast<float*>(memory + plan.poses)),
          shifts(reinterpret_cast<float*>(memory + plan.shifts)),
          roots(reinterpret_cast<float4*>(memory + plan.roots)),
          rays(reinterpret_cast<float4*>(memory + plan.rays)),
          slopes(reinterpret_cast<Slope*>(memory + plan.slopes)),
          exact(reinterpret_cast<ExactRay*>(memory + plan.exact)),
          kept(reinterpret_cast<SharedFrame*>(memory + plan.kept)),
          offsets(reinterpret_cast<float*>(memory + plan.offsets)),
          bases(reinterpret_cast<float*>(memory + plan.bases)) {}
};

// The work of a thread: the hypotheses first, first + step, ... of a joint of a frame.
struct Item {
    int own, frame, joint, first, step;
    bool real;
    const float* poses;  // of the frame's first hypothesis

    __device__ Item(const Block& block, const Plan& plan) {
        const int items = block.frames * block.joints, thread = static_cast<int>(threadIdx.x);
        first = quotient_of(thread, plan.per_items), own = thread - first * items;
        frame = quotient_of(own, plan.per_joints), joint = own - frame * block.joints;
        step = plan.parts;
        real = frame < block.here && first < step;
        poses = block.poses + frame * block.count * block.row + 3 * joint;
    }
};

__device__ __forceinline__ void read_poses(const Block& block, const float* from) {
    const int thread = static_cast<int>(threadIdx.x), numel = 3 * block.joints, rows = block.here * block.count;
    if (block.row == numel && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        constexpr int kStep = 4 * kBlock;
        const int numbers = rows * numel, whole = numbers / 4 * 4;
        float* to = block.poses;
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
    for (int h = thread / 32; h < rows; h += kBlock / 32) {
#pragma unroll 1
        for (int i = thread % 32; i < numel; i += 32) {
            copy_async<4>(block.poses + h * block.row + i, from + static_cast<int64_t>(h) * numel + i);
        }
    }
}

// Calls function(frame, lane, real) for every frame, with kLanes neighbouring threads for each. All threads of a warp
// take part; a thread without a frame gets another's, and `real` is false.
template <int kLanes, typename Function>
__device__ __forceinline__ void for_frames(const Block& block, const Function& function) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
#pragma unroll 1
    for (int begin = thread / 32 * (32 / kLanes); begin < block.here; begin += kBlock / kLanes) {
        const int frame = begin + thread % 32 / kLanes;
        const bool real = frame < block.here;
        function(real ? frame : begin, lane, real);
    }
}

// Computes what is seen of each frame, in three steps: each joint, with a thread for an item; all joints of a frame,
// with four threads; each joint again. It uses float64, since nearly parallel rays differ in their last digits only.
template <typename T>
__device__ __forceinline__ void look(const Block& block, const Item& item, const CudaReprojection& view,
                                     int64_t first) {
    const bool looks = item.real && item.first == 0;
    const T* cameras = static_cast<const T*>(view.intrinsics) + (view.shared_camera ? 0 : 9 * first);
    const int stride = view.shared_camera ? 0 : 9;
    double u = 0.0, v = 0.0;
    float weight = 0.0f;
    if (looks) {
        const T* camera = cameras + item.frame * stride;
        const int64_t at = first * block.joints + item.own;
        weight = static_cast<float>(static_cast<const T*>(view.confidence)[at]);
        float seen_x = 0.0f, seen_y = 0.0f;
        if (weight > 0.0f) {
            const double x = static_cast<double>(static_cast<const T*>(view.keypoints_2d)[2 * at]);
            const double y = static_cast<double>(static_cast<const T*>(view.keypoints_2d)[2 * at + 1]);
            u = (x - static_cast<double>(camera[2])) * inverse_of(static_cast<double>(camera[0]));
            v = (y - static_cast<double>(camera[5])) * inverse_of(static_cast<double>(camera[4]));
            seen_x = static_cast<float>(x), seen_y = static_cast<float>(y);
        }
        block.exact[item.own] = {u, v};
        block.rays[item.own] = make_float4(seen_x, seen_y, weight, 0.0f);  // pixels as yet
    }
    __syncthreads();
    for_frames<4>(block, [&](int frame, int lane, bool real) {
        const int start = frame * block.joints, end = start + block.joints;
        double total = 0.0, mean_u = 0.0, mean_v = 0.0, spread = 0.0;
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
#pragma unroll 1
        for (int j = start + lane; j < end; j += 4) {
            const ExactRay ray = block.exact[j];
            const float4 seen = block.rays[j];
            const double w = static_cast<double>(seen.z);
            total += w, mean_u += w * ray.u, mean_v += w * ray.v;
            if (!(seen.z > 0.0f)) continue;
            low_x = seen.x < low_x ? seen.x : low_x, high_x = high_x < seen.x ? seen.x : high_x;
            low_y = seen.y < low_y ? seen.y : low_y, high_y = high_y < seen.y ? seen.y : high_y;
        }
        total = lanes_sum<4>(total);
        const double inverse_total = inverse_of(total);
        mean_u = lanes_sum<4>(mean_u) * inverse_total, mean_v = lanes_sum<4>(mean_v) * inverse_total;
#pragma unroll 1
        for (int j = start + lane; j < end; j += 4) {
            const double off_u = block.exact[j].u - mean_u, off_v = block.exact[j].v - mean_v;
            spread += static_cast<double>(block.rays[j].z) * (off_u * off_u + off_v * off_v);
        }
        spread = lanes_sum<4>(spread);
        const float width = lanes_max<4>(high_x) + lanes_max<4>(-low_x);
        const float height = lanes_max<4>(high_y) + lanes_max<4>(-low_y);
        const float longer = width < height ? height : width, side = longer < 2e-6f ? 2e-6f : longer;
        // NaN where all rays coincide, and what is multiplied by it.
        const double inverse_spread = spread > 1e-20 * total ? inverse_of(spread) : static_cast<double>(kNan);
        if (real) {  // each of the four for its own joints
#pragma unroll 1
            for (int j = start + lane; j < end; j += 4) {
                const double part = static_cast<double>(block.rays[j].z) * inverse_spread;
                block.slopes[j] = {static_cast<float>(part * (block.exact[j].u - mean_u)),
                                   static_cast<float>(part * (block.exact[j].v - mean_v))};
            }
        }
        if (real && lane == 0) {
            const T* camera = cameras + frame * stride;
            SharedFrame& kept = block.kept[frame];
            kept.mean_u = static_cast<float>(mean_u), kept.mean_v = static_cast<float>(mean_v);
            kept.inverse_total = static_cast<float>(inverse_total);
            const float fx = static_cast<float>(camera[0]), fy = static_cast<float>(camera[4]);
            kept.fy_over_fx = fy / fx;
            kept.scale = (fx < 0.0f ? -fx : fx) * kept.inverse_total / (side * view.temperature);
        }
    });
    __syncthreads();
    if (looks) {
        block.rays[item.own] = make_float4(static_cast<float>(u), static_cast<float>(v), weight,
                                           view.weight * (1.0f < weight ? 1.0f : weight));
    }
}

// Roots by weighted linear least squares, t_x - u t_z = u Z - X, and the same for y; NaN if the keypoints do not
// determine them. Costs are the weighted mean distance of the placed pose from the keypoints, over temperature times
// box side. Two threads place a hypothesis: one takes the even joints, one the odd ones. float32 is enough here: the
// rays are relative to their mean, and an error of the depth moves the pose along its rays, which hardly changes the
// cost.
__device__ __forceinline__ void place(const Block& block, float per_count) {
    const int thread = static_cast<int>(threadIdx.x), hypotheses = block.here * block.count;
#pragma unroll 1
    for (int begin = 0; begin < hypotheses; begin += kBlock / 2) {
        const int own = begin + thread / 2, h = own < hypotheses ? own : hypotheses - 1;  // all take part in shuffles
        const int f = quotient_of(h, per_count);
        const float* pose = block.poses + h * block.row;
        const float4* rays = block.rays + f * block.joints;
        const Slope* slopes = block.slopes + f * block.joints;
        const SharedFrame& frame = block.kept[f];
        float sum_x = 0.0f, sum_y = 0.0f, depth = 0.0f;
#pragma unroll 3
        for (int j = thread % 2; j < block.joints; j += 2) {
            const float4 ray = rays[j];
            const Slope slope = slopes[j];
            const float z = pose[3 * j + 2], x = ray.x * z - pose[3 * j], y = ray.y * z - pose[3 * j + 1];
            sum_x += ray.z * x, sum_y += ray.z * y;
            depth -= slope.u * x + slope.v * y;
        }
        depth = lanes_sum<2>(depth), sum_x = lanes_sum<2>(sum_x), sum_y = lanes_sum<2>(sum_y);
        float root[3] = {sum_x * frame.inverse_total + frame.mean_u * depth,
                         sum_y * frame.inverse_total + frame.mean_v * depth, depth};
        float sum = 0.0f, nearest = kInfinity;
#pragma unroll 3
        for (int j = thread % 2; j < block.joints; j += 2) {
            const float4 ray = rays[j];
            const float z = pose[3 * j + 2] + root[2], depth_of_seen = ray.z > 0.0f ? z : 1.0f;
            // As a difference of metres, divided by the depth, it loses no digits.
            const float x = pose[3 * j] + root[0] - ray.x * z;
            const float y = frame.fy_over_fx * (pose[3 * j + 1] + root[1] - ray.y * z);
            sum += ray.z * (nearly_root(x * x + y * y) * nearly_inverse(depth_of_seen));
            nearest = fminf(nearest, depth_of_seen);
        }
        sum = lanes_sum<2>(sum), nearest = -lanes_max<2>(-nearest);
        if (!(nearest > 1e-3f)) sum = sum == sum ? kInfinity : kNan;  // behind the camera there is no image
        if (!is_placed(root)) root[2] = kNan;                         // readers check the depth only
        if (own < hypotheses && thread % 2 == 0) {
            block.roots[h] = make_float4(root[0], root[1], root[2], sum * frame.scale);
        }
    }
}

// Costs become weights: e^-cost over their sum, or equal if no hypothesis can be placed. Each of a frame's threads
// reads and writes its own hypotheses.
template <int kLanes>
__device__ __forceinline__ void weigh(const Block& block, float* weights) {
    for_frames<kLanes>(block, [&](int frame, int lane, bool real) {
        float4* roots = block.roots + frame * block.count;
        const int end = real ? block.count : 0;
        float highest = -kInfinity, total = 0.0f, depth = 0.0f, lost = 0.0f;  // highest: of the negated costs
#pragma unroll 1
        for (int h = lane; h < end; h += kLanes) highest = highest < -roots[h].w ? -roots[h].w : highest;
        highest = lanes_max<kLanes>(highest);
#pragma unroll 1
        for (int h = lane; h < end; h += kLanes) {
            const float cost = roots[h].w;
            // NaN counts as infinitely far.
            roots[h].w = highest == -kInfinity ? 1.0f : cost == cost ? expf(-highest - cost) : 0.0f;
            total += roots[h].w;
        }
        const float share = 1.0f / lanes_sum<kLanes>(total);
#pragma unroll 1
        for (int h = lane; h < end; h += kLanes) {
            const float weight = roots[h].w * share;
            weights[frame * block.count + h] = roots[h].w = weight;
            if (roots[h].z == roots[h].z) {
                depth += weight * roots[h].z;
            } else {
                lost += 1.0f;
            }
        }
        depth = lanes_sum<kLanes>(depth), lost = lanes_sum<kLanes>(lost);
        if (real && lane == 0) block.kept[frame].root_depth = depth, block.kept[frame].lost = lost;
    });
}

// The mean over a frame's joints of the squared distance between keypoint and hypotheses.
__device__ __forceinline__ void average_offsets(const Block& block) {
    for_frames<4>(block, [&](int frame, int lane, bool real) {
        const int start = frame * block.joints, end = start + block.joints;
        float sum = 0.0f, present = 0.0f;
#pragma unroll 1
        for (int j = start + lane; j < end; j += 4) {
            if (block.rays[j].z > 0.0f) sum += block.offsets[j], present += 1.0f;
        }
        sum = lanes_sum<4>(sum), present = lanes_sum<4>(present);
        if (real && lane == 0) block.kept[frame].usual = sum / present;
    });
}

}  // namespace
}  // namespace diffupose
