#include "cuda_cases.h"
#include "modulated_graph_conv/modulated_graph_conv_cuda.h"

namespace diffupose::cases {
namespace {

// Both arrays in float32, or in bfloat16; `wide` is what is compared.
template <typename T>
DeviceArray<T> stored(const DeviceArray<float>& values);
template <>
DeviceArray<float> stored<float>(const DeviceArray<float>& values) {
    return values;
}
template <>
DeviceArray<Bfloat16> stored<Bfloat16>(const DeviceArray<float>& values) {
    return as_bfloat16(values);
}

template <typename T>
constexpr Storage kStorage = sizeof(T) == 2 ? Storage::bfloat16 : Storage::float32;

template <typename T>
void compare_forward(GraphConvSizes sizes, double tolerance) {
    const int64_t numel = sizes.num_poses * sizes.num_joints * sizes.channels;
    const auto hidden = stored<T>(normal(2 * numel));
    const auto modulation = normal(sizes.num_joints * sizes.channels),
               adjacency = normal(sizes.num_joints * sizes.num_joints, 0.3f), bias = normal(sizes.channels);
    DeviceArray<T> out(numel);
    launch_modulated_graph_conv_fwd_cuda({hidden.data(), kStorage<T>}, modulation.data(), adjacency.data(), bias.data(),
                                         {out.data(), kStorage<T>}, sizes, nullptr);
    const auto wide = as_float32(hidden);
    DeviceArray<float> expected(numel);
    launch_modulated_graph_conv_fwd({wide.data(), Storage::float32}, modulation.data(), adjacency.data(), bias.data(),
                                    {expected.data(), Storage::float32}, sizes, 1);
    expect_near("out", as_float32(out), expected, tolerance);
}

template <typename T>
void compare_backward(GraphConvSizes sizes, double tolerance) {
    const int64_t numel = sizes.num_poses * sizes.num_joints * sizes.channels;
    const auto hidden = stored<T>(normal(2 * numel)), grad_out = stored<T>(normal(numel));
    const auto modulation = normal(sizes.num_joints * sizes.channels),
               adjacency = normal(sizes.num_joints * sizes.num_joints, 0.3f);
    DeviceArray<T> grad_hidden(2 * numel);
    DeviceArray<float> grad_modulation(modulation.size()), grad_adjacency(adjacency.size()), grad_bias(sizes.channels),
        workspace(graph_conv_bwd_workspace(sizes));
    launch_modulated_graph_conv_bwd_cuda({grad_out.data(), kStorage<T>}, {hidden.data(), kStorage<T>},
                                         modulation.data(), adjacency.data(), grad_hidden.data(),
                                         grad_modulation.data(), grad_adjacency.data(), grad_bias.data(),
                                         workspace.data(), sizes, nullptr);
    const auto wide_grad = as_float32(grad_out), wide_hidden = as_float32(hidden);
    DeviceArray<float> expected_hidden(2 * numel), expected_modulation(modulation.size()),
        expected_adjacency(adjacency.size()), expected_bias(sizes.channels);
    launch_modulated_graph_conv_bwd({wide_grad.data(), Storage::float32}, {wide_hidden.data(), Storage::float32},
                                    modulation.data(), adjacency.data(), expected_hidden.data(),
                                    expected_modulation.data(), expected_adjacency.data(), expected_bias.data(), sizes,
                                    1);
    expect_near("grad_hidden", as_float32(grad_hidden), expected_hidden, tolerance);
    // Sums of many products, in float32 whatever the storage.
    expect_near("grad_modulation", grad_modulation, expected_modulation, 1e-3);
    expect_near("grad_adjacency", grad_adjacency, expected_adjacency, 1e-3);
    expect_near("grad_bias", grad_bias, expected_bias, 1e-3);
}

}  // namespace

CUDA_CASE(modulated_graph_conv) {
    compare_forward<float>({3, 17, 12}, 1e-4);
    compare_forward<float>({2, 5, 7}, 1e-4);
    compare_forward<Bfloat16>({2, 16, 36}, 0.1);
}

// Twenty poses are two parts, sixteen joints one warp short of an even number, and 21 joints need several rounds.
CUDA_CASE(modulated_graph_conv_backward) {
    compare_backward<float>({20, 16, 12}, 1e-4);
    compare_backward<float>({2, 21, 7}, 1e-4);
    compare_backward<Bfloat16>({3, 17, 36}, 0.1);
}

}  // namespace diffupose::cases
