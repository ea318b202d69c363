#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "common/cuda.h"
#include "common/cuda_grid.h"
#include "common/cuda_storage.h"
#include "philox_normal/philox_cuda.cuh"
#include "reverse_step/reverse_step_cuda.h"

namespace diffupose {
namespace {

// Elements of a thread block. The kernel is bound by memory, and the 51 numbers of a pose are no multiple of four.
// Therefore a block takes a piece of the flat array. A piece begins at a joint and at a multiple of 16 bytes in every
// storage, since 24 divides its length. Noise comes in groups of four that begin at poses, not at pieces: it is drawn
// into shared memory first, and only groups at the ends of pieces are drawn twice. With 17 joints (13 counters a pose)
// a piece takes at most 510 counters: two for each thread. If a thread takes eight elements at once, a piece is twice
// as long: a thread makes two accesses in either case.
template <int kCount>
constexpr int kPiece = kCount == 8 ? 3984 : 1992;

struct Piece {
    int64_t first;
    int count;
};

// Draws z for all elements of a piece, as philox_normal does. Groups at its ends have elements outside: `drawn` has
// room for three more on either side.
__device__ __forceinline__ void draw(const ReverseStepTensors& tensors, const ReverseStepSizes& sizes, int64_t step,
                                     Piece piece, float* drawn) {
    const PhiloxKey key = {static_cast<uint32_t>(tensors.seed), static_cast<uint32_t>(tensors.seed >> 32)};
    const uint32_t numel = static_cast<uint32_t>(3 * sizes.num_joints), per_pose = (numel + 3) / 4;
    const uint32_t hypotheses = static_cast<uint32_t>(sizes.num_hypotheses);
    const int64_t first_pose = piece.first / numel, first_frame = first_pose / hypotheses;
    const uint32_t into = static_cast<uint32_t>(piece.first % numel);  // where in its pose the piece begins
    const uint32_t first_hypothesis = static_cast<uint32_t>(first_pose % hypotheses);
    const uint32_t last = into + static_cast<uint32_t>(piece.count) - 1;
    const uint32_t begin = into / 4, end = last / numel * per_pose + last % numel / 4 + 1;  // counters
    const float per_per_pose = 1.0f / static_cast<float>(per_pose),
                per_hypotheses = 1.0f / static_cast<float>(hypotheses);
    const bool are_many = hypotheses >= 2048;  // more than the poses of a piece, which then has one frame or two
    for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const uint32_t pose = static_cast<uint32_t>(quotient_of(static_cast<int>(i), per_per_pose));
        const uint32_t block = i - pose * per_pose, hypothesis = first_hypothesis + pose;
        const uint32_t frame = are_many
                                   ? (hypothesis >= hypotheses ? 1 : 0)
                                   : static_cast<uint32_t>(quotient_of(static_cast<int>(hypothesis), per_hypotheses));
        float z[4];
        philox_normal_block_cuda(key, static_cast<uint64_t>(tensors.frame_ids[first_frame + frame]),
                                 static_cast<uint32_t>(tensors.hypothesis_ids[hypothesis - frame * hypotheses]),
                                 static_cast<uint32_t>(step), block, z);
        float* to = drawn + (static_cast<int>(pose * numel + 4 * block) - static_cast<int>(into));
        for (int k = 0; k < 4; ++k) {
            if (4 * block + k < numel) to[k] = z[k];
        }
    }
}

template <int kCount, typename T, typename Output>
__device__ __forceinline__ void step_elements(const StepRow& row, float clip, const ReverseStepTensors& tensors,
                                              const ReverseStepSizes& sizes, int64_t step, int64_t first, int i,
                                              const float* drawn) {
    const int64_t at = first + i;
    float x_t[kCount] = {}, output[kCount] = {}, last[kCount] = {}, z[kCount] = {}, x0[kCount], previous[kCount];
    // These loads do not wait for the row, which may itself be loading: terms with coefficient 0 are skipped below.
    load<kCount>(static_cast<const T*>(tensors.sample) + at, x_t);
    const Output* from = static_cast<const Output*>(tensors.model_output);
    if (sizes.output_stride == 3) {
        load<kCount>(from + at, output);
    } else {
        // A piece begins at a joint.
        from += first / 3 * sizes.output_stride;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            output[k] = to_float(from[(i + k) / 3 * sizes.output_stride + (i + k) % 3]);
        }
    }
    if (tensors.x0_last != nullptr) {
        load<kCount>(static_cast<const T*>(tensors.x0_last) + at, last);
    } else if (row.c_1 != 0.0f) {  // the host could not know that this row needs it
#pragma unroll
        for (int k = 0; k < kCount; ++k) last[k] = NAN;
    }
    if (row.s != 0.0f) {
        load<kCount>(tensors.given_noise == nullptr ? drawn + i : tensors.given_noise + at, z);
        if (tensors.noise_scale != nullptr) {
            const int64_t numel = 3 * sizes.num_joints;
            const float* scale = tensors.noise_scale + step * numel;
            int element = static_cast<int>(at % numel);
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                z[k] *= scale[element];
                element = element + 1 == numel ? 0 : element + 1;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        x0[k] = predicted_x0(row, clip, x_t[k], output[k]);
        previous[k] = previous_sample(row, x_t[k], x0[k], last[k], z[k]);
    }
    store<kCount>(static_cast<T*>(tensors.prev_sample) + at, previous);
    if (tensors.x0 != nullptr) store<kCount>(static_cast<T*>(tensors.x0) + at, x0);
}

template <int kCount, typename T, typename Output>
__global__ void __launch_bounds__(kThreads, 4)
    reverse_step_kernel(StepChoice choice, float clip, ReverseStepTensors tensors, ReverseStepSizes sizes) {
    __shared__ __align__(16) float memory[4 + kPiece<kCount> + 4];
    float* drawn = memory + 4;
    const int64_t numel = 3 * sizes.num_frames * sizes.num_hypotheses * sizes.num_joints;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPiece<kCount>;
    const int count = static_cast<int>(numel - first < kPiece<kCount> ? numel - first : kPiece<kCount>);
    StepRow row = choice.row;
    int64_t step = choice.step;
    if (choice.table != nullptr) {
        step = *choice.index;
        const float* from = choice.table + 6 * step;
        row = {from[0], from[1], from[2], from[3], from[4], from[5]};
    }
    if (row.s != 0.0f && tensors.given_noise == nullptr) {
        draw(tensors, sizes, step, {first, count}, drawn);
        __syncthreads();
    }
    const int whole = count / kCount * kCount, thread = static_cast<int>(threadIdx.x);
    for (int i = kCount * thread; i < whole; i += kCount * kThreads) {
        step_elements<kCount, T, Output>(row, clip, tensors, sizes, step, first, i, drawn);
    }
    for (int i = whole + thread; i < count; i += kThreads) {  // at the end of the array
        step_elements<1, T, Output>(row, clip, tensors, sizes, step, first, i, drawn);
    }
}

template <int kCount, typename T, typename Output>
void launch(const StepChoice& choice, float clip, const ReverseStepTensors& tensors, ReverseStepSizes sizes,
            void* stream) {
    const int64_t numel = 3 * sizes.num_frames * sizes.num_hypotheses * sizes.num_joints;
    const auto kernel = reverse_step_kernel<kCount, T, Output>;
    DIFFUPOSE_LAUNCH(kernel, static_cast<unsigned>((numel + kPiece<kCount> - 1) / kPiece<kCount>), kThreads, 0, stream,
                     choice, clip, tensors, sizes);
    check_launch("reverse_step");
}

}  // namespace

void launch_reverse_step_cuda(const StepChoice& choice, float clip, const ReverseStepTensors& tensors,
                              ReverseStepSizes sizes, void* stream) {
    if (sizes.num_frames * sizes.num_hypotheses * sizes.num_joints == 0) return;
    with_storage(tensors.state, [&](auto state) {
        using T = typename decltype(state)::Type;
        with_storage(tensors.output, [&](auto output) {
            using Output = typename decltype(output)::Type;
            if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Output>) {
                constexpr int kCount = 16 / static_cast<int>(sizeof(T));
                // A view of a larger tensor can begin anywhere.
                const bool aligned = is_aligned(static_cast<const T*>(tensors.sample), kCount) &&
                                     is_aligned(static_cast<const Output*>(tensors.model_output), kCount) &&
                                     is_aligned(static_cast<const T*>(tensors.x0_last), kCount) &&
                                     is_aligned(tensors.given_noise, kCount) &&
                                     is_aligned(static_cast<const T*>(tensors.prev_sample), kCount) &&
                                     is_aligned(static_cast<const T*>(tensors.x0), kCount);
                if (aligned) {
                    launch<kCount, T, Output>(choice, clip, tensors, sizes, stream);
                } else {
                    launch<1, T, Output>(choice, clip, tensors, sizes, stream);
                }
            } else {
                throw std::invalid_argument("model_output must have the storage of sample, or sample that of float32");
            }
        });
    });
}

}  // namespace diffupose
