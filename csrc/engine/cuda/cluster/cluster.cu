// The kernel of engine_cuda.h for few poses: a cluster of blocks takes a pose through all layers and steps.
#include "common/cuda.h"
#include "engine/cuda/cluster/cluster_others.cuh"
#include "engine/cuda/engine_cuda.h"
#include "engine/cuda/steps.cuh"

namespace diffupose {
namespace {

#ifdef DIFFUPOSE_CLUSTERS

// What the reverse step needs beside the network's output, for one element of the pose.
struct StepAhead {
    StepRow row;
    float noise;
};

__device__ inline float draw_one(const CudaSampleArgs& args, int64_t pose, uint32_t step, int element) {
    float z[4];
    draw(args, key_of(args.seed), pose, step, element / 4, z);
    const float two[2] = {element % 2 ? z[1] : z[0], element % 2 ? z[3] : z[2]};
    return element % 4 < 2 ? two[0] : two[1];
}

__device__ inline StepAhead look_ahead(const CudaSampleArgs& args, int64_t pose, int step, int element, int elements) {
    StepAhead ahead = {step_row(args, step), 0.0f};
    if (ahead.row.s != 0.0f) {
        const float drawn = draw_one(args, pose, static_cast<uint32_t>(step), element);
        ahead.noise = noise_scale(args, step, elements, element) * drawn;
    }
    return ahead;
}

#endif

// A thread holds one element of x_t in registers from the first step to the last. Every block of the cluster holds all
// elements.
template <int kJointGroups>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CudaSampleArgs args,
                   const LayerRecord* program, int num_layers, int activation_bytes) {
#ifdef DIFFUPOSE_CLUSTERS
    DIFFUPOSE_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<ClusterMemory*>(memory + activation_bytes);
    auto* layers = reinterpret_cast<LayerRecord*>(memory + activation_bytes + sizeof(ClusterMemory));
    const ClusterPlace place = this_cluster_place();
    const int thread = static_cast<int>(threadIdx.x), joints = shape.joints, elements = 3 * joints;
    for (int i = thread; i < activation_bytes / 16; i += kClusterThreads) {
        reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
    }
    constexpr int kWords = static_cast<int>(sizeof(LayerRecord) / sizeof(uint2));
    for (int i = thread; i < num_layers * kWords; i += kClusterThreads) {
        reinterpret_cast<uint2*>(layers)[i] = reinterpret_cast<const uint2*>(program)[i];
    }
    if (thread == 0) open_mailbox(shared.mailboxes[0]), open_mailbox(shared.mailboxes[1]);
    sync_cluster();  // all blocks run, their mailboxes are open, and their activations are zero

    const int first = next_product(layers, num_layers, num_layers - 1);
    unsigned turn = 0, products = 0;  // rounds and product layers so far
    HeldWeights held;
    fetch_weights(layers[first], 0, held, place);
    fetch_constants(layers[first], 0, args.parameters, shared.constants[0], place.rank);
    auto* const input = at<Bfloat16>(memory, shape.input);
    const int64_t poses = args.num_frames * args.num_hypotheses;
    for (int64_t pose = blockIdx.x / kClusterBlocks; pose < poses; pose += gridDim.x / kClusterBlocks) {
        float x = 0.0f, x0_last = 0.0f;
        const int own = ClusterLayout::index(thread / 3, thread % 3, shape.input_blocks);
        if (thread < elements) {
            x = draw_one(args, pose, static_cast<uint32_t>(kPhiloxMaxStep), thread);
            input[own] = from_float<Bfloat16>(x);
        }
        const float* condition = args.condition + pose / args.num_hypotheses * joints * shape.condition_channels;
        for (int i = thread; i < joints * shape.condition_channels; i += kClusterThreads) {
            const int joint = i / shape.condition_channels, channel = 3 + i % shape.condition_channels;
            input[ClusterLayout::index(joint, channel, shape.input_blocks)] = from_float<Bfloat16>(condition[i]);
        }
        __syncthreads();
        for (int step = 0; step < args.num_steps; ++step) {
            StepAhead ahead = {};
            const float* parameters = args.parameters + step * args.num_parameters;
#pragma unroll 1
            for (int i = 0; i < num_layers; ++i) {
                const LayerRecord& layer = layers[i];
                if (!is_product(layer)) {
                    run_alone<kJointGroups>(layer, memory, parameters, joints, place);
                    __syncthreads();
                    continue;
                }
                Mailbox& mailbox = shared.mailboxes[products % 2];
                if (thread == 0) expect_mail(mailbox, bytes_of_mail(layer, joints));
                const int next = next_product(layers, num_layers, i), rounds = rounds_of(layer);
                const bool last = next <= i;
#pragma unroll 1
                for (int round = 0; round < rounds; ++round, ++turn) {
                    const int block = block_of(round, place.slot, place.rank);
                    const bool more = round + 1 < rounds;
                    const LayerRecord& next_layer = layers[more ? i : next];
                    const int next_round = more ? round + 1 : 0;
                    const auto meet = [&] {
                        fetch_weights(next_layer, next_round, held, place);
                        wait_for_copies();  // of this round's constants
                        __syncthreads();
                    };
                    const RoundConstants& constants = shared.constants[turn % 2];
                    if (layer.kind == LayerKind::graph_conv) {
                        PartSums<kJointGroups, 2> sums = {};
                        multiply_part<kJointGroups>(layer, memory, block, held, place, sums);
                        store_part<kJointGroups>(shared, sums, place);
                        meet();
                        end_round<kJointGroups, 2>(layer, memory, shared, constants, mailbox, round, joints,
                                                   place.rank);
                    } else {  // linear
                        PartSums<kJointGroups, 1> sums = {};
                        multiply_part<kJointGroups>(layer, memory, block, held, place, sums);
                        store_part<kJointGroups>(shared, sums, place);
                        meet();
                        end_round<kJointGroups, 1>(layer, memory, shared, constants, mailbox, round, joints,
                                                   place.rank);
                    }
                    const int later = more || !last ? step : (step + 1 == args.num_steps ? 0 : step + 1);
                    fetch_constants(next_layer, next_round, args.parameters + later * args.num_parameters,
                                    shared.constants[(turn + 1) % 2], place.rank);
                }
                if (last && thread < elements) ahead = look_ahead(args, pose, step, thread, elements);
                wait_for_mail(mailbox, products++ / 2);
            }
            if (thread < elements) {
                const auto* output = at<const float>(memory, shape.output);
                const float said = output[ClusterLayout::index(thread / 3, thread % 3, shape.output_blocks)];
                const float x0 = predicted_x0(ahead.row, args.clip, x, said);
                x = previous_sample(ahead.row, x, x0, x0_last, ahead.noise);
                x0_last = x0;
                input[own] = from_float<Bfloat16>(x);
            }
            __syncthreads();
        }
        if (place.rank == 0 && thread < elements) args.out[pose * elements + thread] = x;
    }
    wait_for_copies();
#endif
}

}  // namespace

int64_t cluster_bytes(int64_t activation_bytes, int num_layers) {
    return activation_bytes + static_cast<int64_t>(sizeof(ClusterMemory) + num_layers * sizeof(LayerRecord));
}

int clusters_available(int num_joints, int64_t shared_bytes) {
    if (shared_bytes > 1 << 30) return 0;
    const auto kernel = cluster_joint_groups(num_joints) == 2 ? cluster_kernel<2> : cluster_kernel<3>;
    return clusters_together(kernel, kClusterThreads, static_cast<int>(shared_bytes));
}

void launch_sample_clusters(const CudaProgram& program, const CudaSampleArgs& args, int num_clusters, void* stream) {
    const int64_t poses = args.num_frames * args.num_hypotheses;
    if (poses == 0) return;
    const auto bytes = static_cast<int>(cluster_bytes(program.tile_bytes, program.num_layers));
    const auto kernel = cluster_joint_groups(program.num_joints) == 2 ? cluster_kernel<2> : cluster_kernel<3>;
    DIFFUPOSE_LAUNCH_CLUSTERS(kernel, poses < num_clusters ? poses : num_clusters, kClusterThreads, bytes, stream,
                              shape_of(program), args, program.layers_cuda, program.num_layers,
                              static_cast<int>(program.tile_bytes));
    check_launch("cluster_kernel");
}

}  // namespace diffupose
