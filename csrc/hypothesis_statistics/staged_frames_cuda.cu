#include "common/cuda.h"
#include "common/cuda_copy.h"
#include "common/cuda_storage.h"
#include "hypothesis_statistics/hypothesis_statistics_cuda.h"
#include "hypothesis_statistics/seen_frame.h"
#include "hypothesis_statistics/staged_frames_cuda.h"

namespace diffupose {
namespace {

// A block takes some frames and reads their hypotheses from memory once, all at a time, into shared memory. There two
// threads place a hypothesis, one for its even joints and one for its odd ones; and what is summed over hypotheses a
// thread sums for a joint of a frame, an item, or for every n-th hypothesis where there are more threads than items.
constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr unsigned kAll = 0xffffffffu;
// Of a hypothesis' thread: what the others of the block may need. Of an item's: sums.
constexpr int kProducts = 6, kViewSums = 9, kResults = 15;
// Two blocks fit a multiprocessor of any GPU that has 228 KiB of shared memory, one wherever there are 99 KiB.
constexpr int kMaxSharedBytes = 96 << 10;

// What all hypotheses of a frame share.
struct SharedFrame {
    double mean_u, mean_v, inverse_total, inverse_spread;
    float fx, fy, scale;  // of errors, by which they become costs
    float root_depth;     // weighted sum of the hypotheses that can be placed
    float lost;           // how many cannot
};

// How a block's shared memory is divided, in bytes from its beginning.
struct Plan {
    int frames, row;  // frames of a block, numbers between hypotheses: odd, so that threads find them in other banks
    int parts;        // threads of an item
    int poses, roots, rays, weights, slopes, seen, kept, centers, offsets, bases, end;
};

__host__ __device__ inline int numbers_of_results(int items, int parts) {
    return (parts > 1 ? (kProducts + kViewSums) * kBlock : 0) + kResults * items;
}

Plan plan_of(const HypothesisSizes& sizes, bool view) {
    const int joints = static_cast<int>(sizes.num_joints), numel = 3 * joints;
    Plan plan = {};
    if (sizes.num_hypotheses > kMaxSharedBytes / (12 * joints)) return plan;
    const int count = static_cast<int>(sizes.num_hypotheses), narrow = kBlock / joints;
    // As many hypotheses as are placed at a time, or twice as many where two frames would not be.
    const int few = (count > kBlock / 4 ? kBlock : kBlock / 2) / count,
              staged = kMaxSharedBytes / 2 / (12 * joints * count);
    const int fitting = few < staged ? few : staged, most = fitting < 1 ? 1 : fitting < narrow ? fitting : narrow;
    // Every block should begin at a multiple of 16 bytes.
    plan.frames = most;
    while (plan.frames > 1 && plan.frames * count * numel % 4 != 0) --plan.frames;
    if (plan.frames * count * numel % 4 != 0) plan.frames = most;
    plan.row = numel | 1;
    const int items = plan.frames * joints, hypotheses = plan.frames * count;
    plan.parts = kBlock / items < count ? kBlock / items : count;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int begin = end;
        end += (bytes + 15) / 16 * 16;
        return begin;
    };
    const int results = numbers_of_results(items, plan.parts), numbers = hypotheses * plan.row;
    plan.poses = take(4 * (numbers < results ? results : numbers));
    plan.centers = take(plan.parts > 1 ? 12 * kBlock : 0);
    if (view) {
        plan.roots = take(16 * hypotheses);
        plan.rays = take(16 * items);
        plan.weights = take(16 * items);
        plan.slopes = take(8 * items);
        plan.seen = take(16 * items);
        plan.kept = take(static_cast<int>(sizeof(SharedFrame)) * plan.frames);
        plan.offsets = take(4 * items);
        plan.bases = take(12 * plan.frames);
    }
    plan.end = end <= kMaxSharedBytes ? end : 0;
    return plan;
}

struct alignas(16) Pair {
    double first, second;
};

// --- Instructions that C++ has no word for.
// ---------------------------------------------------------------------------

// 1 / x but for the last bit; of what is next to zero, infinity.
__device__ __forceinline__ float nearly_inverse(float x) {
#ifdef __CUDACC__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

// The square root but for the last bit; of what is next to zero, zero.
__device__ __forceinline__ float nearly_root(float x) {
#ifdef __CUDACC__
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::sqrt(x);
#endif
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kAll, value, bits);
    return value;
}

// Of four neighbours.
__device__ __forceinline__ double quad_sum(double value) {
    value += __shfl_xor_sync(kAll, value, 1);
    return value + __shfl_xor_sync(kAll, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
    for (int bits : {1, 2}) {
        const float other = __shfl_xor_sync(kAll, value, bits);
        value = value < other ? other : value;
    }
    return value;
}

__device__ __forceinline__ float warp_min(float value) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
        const float other = __shfl_xor_sync(kAll, value, bits);
        value = other < value ? other : value;
    }
    return value;
}

// --- The parts of the work.
// -------------------------------------------------------------------------------------------

// Of a block: its frames, and its shared memory by what lies there.
struct Block {
    int frames, here, count, joints, row;  // here: frames that there are, fewer than frames at the end
    float *poses, *centers;
    float4* roots;  // and weights, before them costs
    Pair *rays, *weights;
    double* slopes;
    float4* seen;  // rays in float32, confidence, and what part of the way to its ray a joint may go
    SharedFrame* kept;
    float *offsets, *bases;

    __device__ Block(const Plan& plan, const HypothesisSizes& sizes, int64_t first, unsigned char* memory)
        : frames(plan.frames),
          here(static_cast<int>(sizes.num_frames - first < plan.frames ? sizes.num_frames - first : plan.frames)),
          count(static_cast<int>(sizes.num_hypotheses)),
          joints(static_cast<int>(sizes.num_joints)),
          row(plan.row),
          poses(reinterpret_cast<float*>(memory + plan.poses)),
          centers(reinterpret_cast<float*>(memory + plan.centers)),
          roots(reinterpret_cast<float4*>(memory + plan.roots)),
          rays(reinterpret_cast<Pair*>(memory + plan.rays)),
          weights(reinterpret_cast<Pair*>(memory + plan.weights)),
          slopes(reinterpret_cast<double*>(memory + plan.slopes)),
          seen(reinterpret_cast<float4*>(memory + plan.seen)),
          kept(reinterpret_cast<SharedFrame*>(memory + plan.kept)),
          offsets(reinterpret_cast<float*>(memory + plan.offsets)),
          bases(reinterpret_cast<float*>(memory + plan.bases)) {}
};

__device__ __forceinline__ void read_poses(const Block& block, const float* from) {
    const int thread = static_cast<int>(threadIdx.x), numel = 3 * block.joints, rows = block.here * block.count;
    if (block.row == numel && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const int numbers = rows * numel, whole = numbers / 4 * 4;
        for (int i = 4 * thread; i < whole; i += 4 * kBlock) copy_async<16>(block.poses + i, from + i);
        for (int i = whole + thread; i < numbers; i += kBlock) copy_async<4>(block.poses + i, from + i);
        return;
    }
    for (int h = thread / 32; h < rows; h += kWarps) {
#pragma unroll 1
        for (int i = thread % 32; i < numel; i += 32) {
            copy_async<4>(block.poses + h * block.row + i, from + static_cast<int64_t>(h) * numel + i);
        }
    }
}

// What is seen of each frame, in three steps: of each joint, a thread for an item; of all joints of a frame, four
// threads for it; and of each joint again.
template <typename T>
__device__ __forceinline__ void look(const Block& block, const CudaReprojection& view, int64_t first) {
    const int thread = static_cast<int>(threadIdx.x), item = thread;  // there are no more of them than threads
    const bool real = item < block.here * block.joints;
    const T* cameras = static_cast<const T*>(view.intrinsics) + (view.shared_camera ? 0 : 9 * first);
    const int stride = view.shared_camera ? 0 : 9;
    double u = 0.0, v = 0.0, w = 0.0;
    if (real) {
        const T* camera = cameras + item / block.joints * stride;
        const int64_t at = first * block.joints + item;
        w = static_cast<double>(static_cast<const T*>(view.confidence)[at]);
        float seen_x = 0.0f, seen_y = 0.0f;
        if (w > 0.0) {
            const double x = static_cast<double>(static_cast<const T*>(view.keypoints_2d)[2 * at]);
            const double y = static_cast<double>(static_cast<const T*>(view.keypoints_2d)[2 * at + 1]);
            u = (x - static_cast<double>(camera[2])) / static_cast<double>(camera[0]);
            v = (y - static_cast<double>(camera[5])) / static_cast<double>(camera[4]);
            seen_x = static_cast<float>(x), seen_y = static_cast<float>(y);
        }
        block.rays[item] = {u, v};
        block.weights[item] = {w, 0.0};
        block.seen[item] = make_float4(seen_x, seen_y, 0.0f, 0.0f);  // pixels as yet
    }
    __syncthreads();
    for (int begin = thread / 32 * 8; begin < block.here; begin += kBlock / 4) {  // eight frames for a warp
        const int own = begin + thread % 32 / 4,
                  f = own < block.here ? own : block.here - 1;  // all take part in shuffles
        const int start = f * block.joints;
        double total = 0.0, mean_u = 0.0, mean_v = 0.0, spread = 0.0;
        float low_x = kInfinity, low_y = kInfinity, high_x = -kInfinity, high_y = -kInfinity;
#pragma unroll 1
        for (int j = start + thread % 4; j < start + block.joints; j += 4) {
            const Pair ray = block.rays[j];
            const double weight = block.weights[j].first;
            const float4 seen = block.seen[j];
            total += weight, mean_u += weight * ray.first, mean_v += weight * ray.second;
            if (!(weight > 0.0)) continue;
            low_x = seen.x < low_x ? seen.x : low_x, high_x = high_x < seen.x ? seen.x : high_x;
            low_y = seen.y < low_y ? seen.y : low_y, high_y = high_y < seen.y ? seen.y : high_y;
        }
        total = quad_sum(total);
        const double inverse_total = 1.0 / total;
        mean_u = quad_sum(mean_u) * inverse_total, mean_v = quad_sum(mean_v) * inverse_total;
#pragma unroll 1
        for (int j = start + thread % 4; j < start + block.joints; j += 4) {
            const double off_u = block.rays[j].first - mean_u, off_v = block.rays[j].second - mean_v;
            spread += block.weights[j].first * (off_u * off_u + off_v * off_v);
        }
        spread = quad_sum(spread);
        const float width = quad_max(high_x) + quad_max(-low_x), height = quad_max(high_y) + quad_max(-low_y);
        const float longer = width < height ? height : width, side = longer < 2e-6f ? 2e-6f : longer;
        if (own < block.here && thread % 4 == 0) {
            const T* camera = cameras + f * stride;
            SharedFrame& kept = block.kept[f];
            kept.mean_u = mean_u, kept.mean_v = mean_v, kept.inverse_total = inverse_total;
            // NaN where all rays coincide, and what is multiplied by it.
            kept.inverse_spread = spread > 1e-20 * total ? 1.0 / spread : static_cast<double>(kNan);
            kept.fx = static_cast<float>(camera[0]), kept.fy = static_cast<float>(camera[4]);
            kept.scale = 1.0f / static_cast<float>(total) / (side * view.temperature);
        }
    }
    __syncthreads();
    if (real) {
        const SharedFrame& kept = block.kept[item / block.joints];
        const float weight = static_cast<float>(w);
        block.weights[item].second = w * (u - kept.mean_u) * kept.inverse_spread;
        block.slopes[item] = w * (v - kept.mean_v) * kept.inverse_spread;
        block.seen[item] = make_float4(static_cast<float>(u), static_cast<float>(v), weight,
                                       view.weight * (1.0f < weight ? 1.0f : weight));
    }
}

// Roots by weighted linear least squares, t_x - u t_z = u Z - X, and the same for y, NaN where they are free; and
// costs, the weighted mean distance of the placed pose from the keypoints, in box sides and temperatures.
__device__ __forceinline__ void place(const Block& block) {
    const int thread = static_cast<int>(threadIdx.x), hypotheses = block.here * block.count;
    for (int begin = 0; begin < hypotheses; begin += kBlock / 2) {
        const int own = begin + thread / 2, h = own < hypotheses ? own : hypotheses - 1;  // all take part in shuffles
        const int f = h / block.count;
        const float* pose = block.poses + h * block.row;
        const SharedFrame& frame = block.kept[f];
        double sum_x = 0.0, sum_y = 0.0, depth = 0.0;
#pragma unroll 3
        for (int j = thread % 2; j < block.joints; j += 2) {
            const Pair ray = block.rays[f * block.joints + j], weight = block.weights[f * block.joints + j];
            const double z = static_cast<double>(pose[3 * j + 2]);
            const double x = ray.first * z - static_cast<double>(pose[3 * j]);
            const double y = ray.second * z - static_cast<double>(pose[3 * j + 1]);
            sum_x += weight.first * x, sum_y += weight.first * y;
            depth -= weight.second * x + block.slopes[f * block.joints + j] * y;
        }
        depth += __shfl_xor_sync(kAll, depth, 1);
        sum_x += __shfl_xor_sync(kAll, sum_x, 1);
        sum_y += __shfl_xor_sync(kAll, sum_y, 1);
        float root[3] = {static_cast<float>(sum_x * frame.inverse_total + frame.mean_u * depth),
                         static_cast<float>(sum_y * frame.inverse_total + frame.mean_v * depth),
                         static_cast<float>(depth)};
        float sum = 0.0f;
#pragma unroll 3
        for (int j = thread % 2; j < block.joints; j += 2) {
            const float4 seen = block.seen[f * block.joints + j];
            const float z = pose[3 * j + 2] + root[2];
            // As a difference of metres, divided by the depth, it loses no digits.
            const float x = frame.fx * (pose[3 * j] + root[0] - seen.x * z);
            const float y = frame.fy * (pose[3 * j + 1] + root[1] - seen.y * z);
            const float distance = nearly_root(x * x + y * y) * nearly_inverse(z);
            // Behind the camera there is no image.
            const float weighted = (z > 1e-3f ? distance : kInfinity) * seen.z;
            sum += seen.z > 0.0f ? weighted : 0.0f;
        }
        sum += __shfl_xor_sync(kAll, sum, 1);
        if (!is_placed(root)) root[2] = kNan;  // which alone is asked for then
        if (own < hypotheses && thread % 2 == 0) {
            block.roots[h] = make_float4(root[0], root[1], root[2], sum * frame.scale);
        }
    }
}

// Costs become e^-cost over their sum; all alike where no hypothesis can be placed. A warp for a frame, of whose costs
// each thread reads and writes its own ones.
__device__ __forceinline__ void weigh(const Block& block, float* weights) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int f = static_cast<int>(threadIdx.x) / 32; f < block.here; f += kWarps) {
        float4* roots = block.roots + f * block.count;
        float lowest = kInfinity, total = 0.0f, depth = 0.0f, lost = 0.0f;
        for (int h = lane; h < block.count; h += 32) lowest = roots[h].w < lowest ? roots[h].w : lowest;
        lowest = warp_min(lowest);
        for (int h = lane; h < block.count; h += 32) {
            const float cost = roots[h].w;
            // NaN counts as infinitely far.
            roots[h].w = lowest == kInfinity ? 1.0f : cost == cost ? expf(lowest - cost) : 0.0f;
            total += roots[h].w;
        }
        total = warp_sum(total);
        for (int h = lane; h < block.count; h += 32) {
            const float weight = roots[h].w / total;
            weights[f * block.count + h] = roots[h].w = weight;
            if (roots[h].z == roots[h].z) {
                depth += weight * roots[h].z;
            } else {
                lost += 1.0f;
            }
        }
        depth = warp_sum(depth), lost = warp_sum(lost);
        if (lane == 0) block.kept[f].root_depth = depth, block.kept[f].lost = lost;
    }
}

// Of an item: its joint, and the hypotheses first, first + step, ... of its frame.
struct Item {
    int frame, joint, first, step;
    bool real;

    __device__ Item(const Block& block, int parts) {
        const int items = block.frames * block.joints, thread = static_cast<int>(threadIdx.x), own = thread % items;
        frame = own / block.joints, joint = own % block.joints;
        first = thread / items, step = parts;
        real = frame < block.here && first < parts;
    }
};

template <typename Function>
__device__ __forceinline__ void for_each(const Block& block, const Item& item, const Function& function) {
    if (!item.real) return;
    const float* pose = block.poses + (item.frame * block.count + item.first) * block.row + 3 * item.joint;
    for (int h = item.first; h < block.count; h += item.step, pose += item.step * block.row) function(pose, h);
}

// Adds the parts of each item's sums, which lie kBlock apart, into the first one. All have been written.
__device__ __forceinline__ void join(const Block& block, int parts, float* sums, int count) {
    const int items = block.frames * block.joints;
    for (int i = static_cast<int>(threadIdx.x); i < count * items; i += kBlock) {
        float* own = sums + i / items * kBlock + i % items;
        float sum = 0.0f;
        for (int part = 0; part < parts; ++part) sum += own[part * items];
        own[0] = sum;
    }
}

// Numbers of shared memory to memory, neighbours by neighbours.
__device__ __forceinline__ void write(float* to, const float* from, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlock) to[i] = from[i];
}

template <bool kView, typename T>
__global__ void __launch_bounds__(kBlock, kView ? 4 : 6)
    staged_frames_kernel(const float* __restrict__ hypotheses, CudaReprojection view, StatisticsOutputs outputs,
                         HypothesisSizes sizes, Plan plan) {
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * plan.frames;
    const Block block(plan, sizes, first, memory);
    const int thread = static_cast<int>(threadIdx.x), items = block.frames * block.joints, parts = plan.parts;
    read_poses(block, hypotheses + first * sizes.num_hypotheses * sizes.num_joints * 3);
    if constexpr (kView) look<T>(block, view, first);  // in the meantime
    wait_for_copies();
    __syncthreads();

    // Averaging differences from the first one makes the mean of equal hypotheses exactly that pose.
    const Item item(block, parts);
    const float* own = block.poses + item.frame * block.count * block.row + 3 * item.joint;
    float center[3] = {};
    for_each(block, item, [&](const float* pose, int) {
        for (int axis = 0; axis < 3; ++axis) center[axis] += pose[axis] - own[axis];
    });
    if (parts > 1) {
        for (int axis = 0; axis < 3; ++axis) block.centers[axis * kBlock + thread] = center[axis];
    }
    if constexpr (kView) place(block);
    if (kView || parts > 1) __syncthreads();
    if constexpr (kView) weigh(block, outputs.weights + first * sizes.num_hypotheses);
    if (parts > 1) join(block, parts, block.centers, 3);
    if (kView || parts > 1) __syncthreads();
    for (int axis = 0; axis < 3; ++axis) {
        const float sum = parts > 1 ? block.centers[axis * kBlock + thread % items] : center[axis];
        center[axis] = sum / static_cast<float>(block.count);
        if (item.real) center[axis] += own[axis];
    }

    // Of the view: where a joint is seen, off its keypoint in focal lengths, and that squared; its depth, weighted, and
    // how far it is off its ray, in metres; and its position in the hypotheses that cannot be placed.
    constexpr int kSums = kView ? kProducts + kViewSums : kProducts;
    float sums[kSums] = {};
    float4 seen = {};
    if constexpr (kView) {
        if (item.real) seen = block.seen[item.frame * block.joints + item.joint];
    }
    for_each(block, item, [&](const float* pose, [[maybe_unused]] int h) {
        const float x = pose[0] - center[0], y = pose[1] - center[1], z = pose[2] - center[2];
        sums[0] += x * x, sums[1] += y * y, sums[2] += z * z;
        sums[3] += x * y, sums[4] += y * z, sums[5] += x * z;
        if constexpr (kView) {
            const float4 root = block.roots[item.frame * block.count + h];
            const float depth = pose[2] + root.z;
            const float off_x = pose[0] + root.x - seen.x * depth, off_y = pose[1] + root.y - seen.y * depth;
            const float inverse = nearly_inverse(depth);
            const float q_x = off_x * inverse, q_y = off_y * inverse;
            sums[6] += q_x, sums[7] += q_y, sums[8] += q_x * q_x + q_y * q_y;
            if (root.z == root.z) sums[9] += root.w * pose[2], sums[10] += root.w * off_x, sums[11] += root.w * off_y;
        }
    });
    if constexpr (kView) {
        if (item.real && block.kept[item.frame].lost > 0.0f) {
            for_each(block, item, [&](const float* pose, int h) {
                const float4 root = block.roots[item.frame * block.count + h];
                for (int axis = 0; root.z != root.z && axis < 3; ++axis) sums[12 + axis] += root.w * pose[axis];
            });
        }
    }
    if (parts > 1) {
        __syncthreads();  // the poses are done with
        for (int i = 0; i < kSums; ++i) block.poses[i * kBlock + thread] = sums[i];
        __syncthreads();
        join(block, parts, block.poses, kSums);
        __syncthreads();
        for (int i = 0; i < kSums; ++i) sums[i] = block.poses[i * kBlock + thread % items];
    }

    const bool writes = item.real && item.first == 0;
    float refined[3] = {};
    if constexpr (kView) {
        const float share = 1.0f / static_cast<float>(block.count), mean_x = sums[6] * share, mean_y = sums[7] * share;
        const float offset = mean_x * mean_x + mean_y * mean_y, spread = sums[8] * share - offset;
        if (writes) block.offsets[thread] = offset;
        __syncthreads();
        if (writes) {
            // A joint goes S / (S + R) of the way to its ray: S is its variance across the image over the hypotheses, R
            // the squared distance of its keypoint from their mean, or that of all joints on average if that is more.
            const int start = item.frame * block.joints;
            float usual = 0.0f, present = 0.0f;
            for (int j = 0; j < block.joints; ++j) {
                if (block.seen[start + j].z > 0.0f) usual += block.offsets[start + j], present += 1.0f;
            }
            usual /= present;
            const float variance = spread < 0.0f ? 0.0f : spread;  // NaN stays NaN
            const float trust = variance / (variance + (offset > usual ? offset : usual));
            const float rest = 1.0f - (std::isfinite(trust) ? seen.w * trust : 0.0f);
            const float far = sums[9] + block.kept[item.frame].root_depth;
            // No hypothesis of the frame is placed where a ray is no number.
            refined[0] = rest * sums[10] + (std::isfinite(seen.x) ? seen.x * far : 0.0f);
            refined[1] = rest * sums[11] + (std::isfinite(seen.y) ? seen.y * far : 0.0f);
            refined[2] = sums[9];
            if (item.joint == 0) {
                for (int axis = 0; axis < 3; ++axis) block.bases[3 * item.frame + axis] = refined[axis];
            }
        }
        __syncthreads();
        if (writes) {
            for (int axis = 0; axis < 3; ++axis) {
                refined[axis] = refined[axis] - block.bases[3 * item.frame + axis] + sums[12 + axis];
            }
        }
    } else if (parts == 1) {
        __syncthreads();  // the poses are done with
    }

    // Where the parts' sums do not lie.
    float* means = block.poses + numbers_of_results(0, parts);
    float *matrices = means + 3 * items, *moved = matrices + 9 * items;
    if (writes) {
        const float below = block.count < kMinHypotheses ? kNan : static_cast<float>(block.count - 1);
        for (int i = 0; i < kProducts; ++i) sums[i] /= below;
        const float xx = sums[0], yy = sums[1], zz = sums[2], xy = sums[3], yz = sums[4], xz = sums[5];
        const float matrix[9] = {xx, xy, xz, xy, yy, yz, xz, yz, zz};
        for (int i = 0; i < 9; ++i) matrices[9 * thread + i] = matrix[i];
        for (int axis = 0; axis < 3; ++axis) {
            means[3 * thread + axis] = center[axis];
            if (kView) moved[3 * thread + axis] = refined[axis];
        }
    }
    __syncthreads();
    const int64_t at = first * block.joints;
    const int count = block.here * block.joints;
    write(outputs.mean + 3 * at, means, 3 * count);
    write(outputs.covariance + 9 * at, matrices, 9 * count);
    if constexpr (kView) write(outputs.weighted_mean + 3 * at, moved, 3 * count);
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
