// The CUDA engine against the C++ one, through the whole reverse process.
#include "engine_network.h"

namespace diffupose::cases {
namespace {

// The inputs of a chain, for either engine.
struct Chain {
    explicit Chain(int joints, int64_t num_frames = kFrames, int64_t num_chains = kChains)
        : condition(normal(num_frames * joints * kCondition)),
          noise_scale(normal(kSteps * joints * 3)),
          values(normal(kSteps * 4 * kWidth, 0.3f)),
          frames(random_ids(num_frames)),
          chains(random_ids(num_chains)) {}
    int64_t num_poses() const { return frames.size() * chains.size(); }
    DeviceArray<float> condition, noise_scale, values;
    DeviceArray<int64_t> frames, chains;
    // Two steps use the previous x0, one uses noise.
    DeviceArray<float> coefficients{
        std::vector<float>{0, 1, 0.5f, 0.5f, 0, 0.3f, 0.2f, 0.8f, 0.4f, 0.3f, 0.2f, 0, 0, 1, 0, 0.9f, 0.1f, 0}};
    const int64_t seed = -77;
    const float clip = 1.5f;
};

template <typename T>
DeviceArray<float> expected(const Network<T>& network, const Chain& chain) {
    const int64_t half = network.cpu.padded(kWidth);
    DeviceArray<float> parameters(kSteps * network.cpu.num_parameters()), out(chain.num_poses() * network.joints * 3);
    std::fill_n(parameters.data(), parameters.size(), 0.0f);
    for (int64_t i = 0; i < 4 * kSteps; ++i) {
        std::copy_n(chain.values.data() + i * kWidth, kWidth, parameters.data() + i * half);
    }
    const SampleArgs args = {chain.condition.data(),
                             chain.coefficients.data(),
                             chain.noise_scale.data(),
                             parameters.data(),
                             {static_cast<uint64_t>(chain.seed), chain.frames.data(), chain.chains.data()},
                             chain.clip,
                             chain.frames.size(),
                             chain.chains.size(),
                             kSteps,
                             1,
                             out.data()};
    network.cpu.sample(args, [] { return false; });
    return out;
}

template <typename T>
DeviceArray<float> sampled(const Network<T>& network, const Chain& chain, bool persistent) {
    DeviceArray<int64_t> seed(std::vector<int64_t>{chain.seed});
    DeviceArray<float> out(chain.num_poses() * network.joints * 3), x0_last(out.size());
    const CudaSampleArgs args = {chain.condition.data(),
                                 chain.coefficients.data(),
                                 chain.noise_scale.data(),
                                 chain.values.data(),
                                 seed.data(),
                                 chain.frames.data(),
                                 chain.chains.data(),
                                 4 * kWidth,
                                 chain.frames.size(),
                                 chain.chains.size(),
                                 kSteps,
                                 chain.clip,
                                 x0_last.data(),
                                 out.data()};
    if (network.layout == CudaLayout::wgmma) {
        launch_sample_wgmma(network.program(), args, 1, nullptr);
    } else if (network.layout == CudaLayout::cluster) {
        launch_sample_clusters(network.program(), args, 1, nullptr);  // one cluster takes all poses in turn
    } else if (persistent) {
        launch_sample_persistent(network.program(), args, 1, nullptr);  // the block takes both pose tiles in turn
    } else {
        DeviceArray<unsigned char> workspace(2 * network.tile_bytes);
        launch_sample_layers(network.program(), args, workspace.data(), nullptr);
    }
    return out;
}

}  // namespace

CUDA_CASE(engine_float32) {
    const Network<float> network(17);
    const Chain chain(17);
    const auto out = sampled(network, chain, false);
    expect_near("samples", out, expected(network, chain), 1e-4);
}

CUDA_CASE(engine_bfloat16) {
    const Network<Bfloat16> network(17);
    const Chain chain(17);
    const auto out = sampled(network, chain, false), exact = expected(network, chain);
    expect_near("samples", out, exact, 0.1);
    // The kernels add channels in different orders, so bits differ.
    expect_near("persistent samples", sampled(network, chain, true), out, 0.05);
}

CUDA_CASE(engine_wgmma) {
    for (const int joints : {15, 17}) {
        const auto before = random_bits();
        const Network<Bfloat16> network(joints);
        random_bits() = before;  // the same numbers again, in another layout
        const Network<Bfloat16> hopper(joints, CudaLayout::wgmma);
        const Chain chain(joints);
        const auto out = sampled(hopper, chain, true);
        expect_near("samples", out, expected(hopper, chain), 0.1);
        expect_near("samples by mma", out, sampled(network, chain, true), 0.05);
    }
}

CUDA_CASE(engine_cluster) {
    for (const int joints : {15, 17}) {
        const auto before = random_bits();
        const Network<Bfloat16> network(joints);
        random_bits() = before;
        const Network<Bfloat16> cluster(joints, CudaLayout::cluster);
        const Chain chain(joints, 1, 2);
        const auto out = sampled(cluster, chain, true);
        expect_near("samples", out, expected(cluster, chain), 0.1);
        expect_near("samples by layers", out, sampled(network, chain, false), 0.05);
    }
}

CUDA_CASE(engine_denoise_of_15_joints) {
    const int64_t poses = 9;
    const Network<float> network(15);
    const auto sample = normal(poses * 15 * 3), condition = normal(poses * 15 * kCondition),
               values = normal(4 * kWidth);
    DeviceArray<float> parameters(network.cpu.num_parameters()), exact(poses * 15 * 3), out(exact.size());
    std::fill_n(parameters.data(), parameters.size(), 0.0f);
    for (int i = 0; i < 4; ++i) {
        std::copy_n(values.data() + i * kWidth, kWidth, parameters.data() + i * network.cpu.padded(kWidth));
    }
    network.cpu.denoise({sample.data(), condition.data(), parameters.data(), poses, 1, exact.data()},
                        [] { return false; });
    DeviceArray<unsigned char> workspace(2 * network.tile_bytes);
    launch_denoise(network.program(), {sample.data(), condition.data(), values.data(), poses, out.data()},
                   workspace.data(), nullptr);
    expect_near("output", out, exact, 1e-4);
}

// The layer has so many columns that a block takes 16 of them.
template <typename T>
void wide_layer(double tolerance) {
    constexpr int kJoints = 17, kOut = 1030;
    const int64_t poses = 9;
    const auto weight = normal(5 * 2 * kOut, 0.2f), own = normal(kJoints * kOut), neighbors = normal(kJoints * kOut),
               bias = normal(kOut), sample = normal(poses * kJoints * 3), condition = normal(poses * kJoints * 2);
    auto adjacency = normal(kJoints * kJoints, 0.2f);
    for (int64_t j = 0; j < kJoints; ++j) adjacency[j * (kJoints + 1)] = 0.0f;
    Engine cpu(kJoints, {5, kOut}, false);
    cpu.add(GraphConvLayer{0, 1, -1, Activation::relu, 5, kOut, weight.data(), own.data(), neighbors.data(),
                           adjacency.data(), bias.data()});
    DeviceArray<float> exact(poses * kJoints * kOut), out(exact.size());
    cpu.denoise({sample.data(), condition.data(), nullptr, poses, 1, exact.data()}, [] { return false; });

    const int64_t rows = 2 * joint_pairs(kJoints), stride = 16 * channel_blocks(kOut);
    const auto packed_weight = packed<T>(weight, 5, kOut, 2);
    const auto padded_own = padded(own.data(), kJoints, kOut, rows, stride);
    const auto padded_neighbors = padded(neighbors.data(), kJoints, kOut, rows, stride);
    const auto padded_adjacency = padded(adjacency.data(), kJoints, kJoints, rows, kAdjacencyStride);
    const auto padded_bias = padded(bias.data(), 1, kOut, 1, stride);
    LayerRecord layer{};
    layer.kind = LayerKind::graph_conv, layer.activation = Activation::relu;
    layer.input_blocks = 1, layer.output_blocks = static_cast<int32_t>(channel_blocks(kOut)), layer.output_is_float = 1;
    layer.output = rows * kTilePoses * 16 * int64_t{sizeof(T)}, layer.residual = -1;
    layer.weight = packed_weight.data(), layer.own = padded_own.data(), layer.neighbors = padded_neighbors.data();
    layer.adjacency = padded_adjacency.data(), layer.bias = padded_bias.data();
    const int64_t tile_bytes = layer.output + rows * kTilePoses * stride * 4;
    DeviceArray<unsigned char> workspace(2 * tile_bytes);
    launch_denoise(
        {&layer, nullptr, 1, kJoints, 2, kOut, 0, layer.output, tile_bytes, sizeof(T) == 2, CudaLayout::pairs},
        {sample.data(), condition.data(), nullptr, poses, out.data()}, workspace.data(), nullptr);
    expect_near("output", out, exact, tolerance);
}

CUDA_CASE(engine_wide_layer) {
    wide_layer<float>(1e-4);
    wide_layer<Bfloat16>(0.1);
}

}  // namespace diffupose::cases
