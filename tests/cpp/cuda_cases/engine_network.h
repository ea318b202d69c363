// A small network with every kind of layer, for the C++ engine and for the CUDA engine in each layout.
#pragma once

#include <deque>

#include "common/bfloat16.h"
#include "cuda_cases.h"
#include "engine/cpu/engine.h"
#include "engine/cuda/engine_cuda.h"

namespace diffupose::cases {

// More than one block of 64 channels, the last one incomplete.
constexpr int kWidth = 80, kHead = 16, kCondition = 2, kSteps = 3;
constexpr int64_t kFrames = 2, kChains = 5;  // ten poses: one pose tile and a part of another

inline int64_t channel_blocks(int64_t channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }

inline Bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline void put(float* to, float value) { *to = value; }
inline void put(Bfloat16* to, float value) { *to = rounded(value); }

// Rows with zeros after each row and after the last one.
inline DeviceArray<float> padded(const float* values, int64_t rows, int64_t columns, int64_t all_rows, int64_t stride) {
    DeviceArray<float> result(all_rows * stride);
    std::fill_n(result.data(), result.size(), 0.0f);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(values + i * columns, columns, result.data() + i * stride);
    return result;
}

// A weight [k, products n] in the layout that fragments.cuh describes, written from its description.
template <typename T>
DeviceArray<T> packed(const DeviceArray<float>& weight, int64_t k, int64_t n, int64_t products) {
    const int64_t k_blocks = channel_blocks(k), columns = channel_blocks(n) * kChannelBlock;
    DeviceArray<T> result(products * k_blocks * kChannelBlock * columns);
    int64_t at = 0;
    const auto next = [&](int64_t row, int64_t column, int64_t product) {
        const bool inside = row < k && column < n;
        put(result.data() + at++, inside ? weight[row * products * n + product * n + column] : 0.0f);
    };
    for (int64_t block = 0; block < columns / 8; ++block) {
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
            if (sizeof(T) == 2) {
                for (int64_t lane = 0; lane < 32; ++lane) {
                    for (int64_t product = 0; product < products; ++product) {
                        for (const int64_t row : {0, 1, 8, 9}) {
                            next(16 * k_block + 2 * (lane % 4) + row, 8 * block + lane / 4, product);
                        }
                    }
                }
            } else {
                for (int64_t quarter = 0; quarter < 4; ++quarter) {
                    for (int64_t column = 0; column < 8; ++column) {
                        for (int64_t product = 0; product < products; ++product) {
                            for (const int64_t row : {0, 1, 8, 9}) {
                                next(16 * k_block + 2 * quarter + row, 8 * block + column, product);
                            }
                        }
                    }
                }
            }
        }
    }
    return result;
}

// The same in the layout of wgmma_layers.cuh.
inline DeviceArray<Bfloat16> packed_for_wgmma(const DeviceArray<float>& weight, int64_t k, int64_t n,
                                              int64_t products) {
    const int64_t rounds = (channel_blocks(k) + kWgmmaRoundBlocks - 1) / kWgmmaRoundBlocks, blocks = (n + 63) / 64;
    const int64_t k_blocks = rounds * kWgmmaRoundBlocks;
    DeviceArray<Bfloat16> result(products * (k_blocks * blocks + kWgmmaBlocksAhead) * 16 * 64);
    for (int64_t i = products * k_blocks * blocks * 16 * 64; i < static_cast<int64_t>(result.size()); ++i) {
        put(result.data() + i, 0.0f);
    }
    int64_t at = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
            for (int64_t product = 0; product < products; ++product) {
                for (int64_t thread = 0; thread < 128; ++thread) {
                    for (int64_t i = 0; i < 8; ++i) {
                        const int64_t row = 16 * k_block + thread % 4 * 2 + i % 2 + i / 4 * 8;
                        const int64_t column = 64 * block + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
                        const bool inside = row < k && column < n;
                        put(result.data() + at++, inside ? weight[row * products * n + product * n + column] : 0.0f);
                    }
                }
            }
        }
    }
    return result;
}

// The same in the layout of cluster_layers.cuh.
inline DeviceArray<Bfloat16> packed_for_cluster(const DeviceArray<float>& weight, int64_t k, int64_t n,
                                                int64_t products) {
    const int64_t k_blocks = channel_blocks(k), blocks = channel_blocks(n);
    DeviceArray<Bfloat16> result(products * k_blocks * blocks * 16 * 16);
    int64_t at = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
            for (int64_t product = 0; product < products; ++product) {
                for (int64_t lane = 0; lane < 32; ++lane) {
                    for (const int64_t high : {0, 8}) {
                        for (const int64_t half : {0, 8}) {
                            for (const int64_t low : {0, 1}) {
                                const int64_t row = 16 * k_block + lane % 4 * 2 + high + low;
                                const int64_t column = 16 * block + lane / 4 + half;
                                const bool inside = row < k && column < n;
                                put(result.data() + at++,
                                    inside ? weight[row * products * n + product * n + column] : 0.0f);
                            }
                        }
                    }
                }
            }
        }
    }
    return result;
}

// Values [joints, n], or [n] for all joints, by channel.
inline DeviceArray<float> by_channel(const float* values, int64_t joints, int64_t n, bool for_all = false) {
    DeviceArray<float> result(16 * channel_blocks(n) * kAdjacencyStride);
    for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
        const int64_t channel = i / kAdjacencyStride, joint = i % kAdjacencyStride;
        const bool inside = channel < n && joint < joints;
        result[i] = inside ? values[(for_all ? 0 : joint * n) + channel] : 0.0f;
    }
    return result;
}

inline DeviceArray<float> factors_for_wgmma(const float* values, int64_t joints, int64_t n) {
    const int64_t fours = (wgmma_joints(static_cast<int>(joints)) + 3) / 4;
    DeviceArray<float> result(fours * 4 * channel_blocks(n) * 16);
    int64_t at = 0;
    for (int64_t eight = 0; eight < 2 * channel_blocks(n); ++eight) {
        for (int64_t four = 0; four < fours; ++four) {
            for (int64_t channel = 8 * eight; channel < 8 * eight + 8; ++channel) {
                for (int64_t joint = 4 * four; joint < 4 * four + 4; ++joint) {
                    result[at++] = joint < joints && channel < n ? values[joint * n + channel] : 0.0f;
                }
            }
        }
    }
    return result;
}

// The same layers for both engines. The buffers of the CUDA engine do not overlap.
template <typename T>
struct Network {
    explicit Network(int joints_, CudaLayout layout_ = CudaLayout::pairs)
        : joints(joints_),
          layout(layout_),
          all_joints(layout == CudaLayout::cluster ? kAdjacencyStride
                     : layout == CudaLayout::wgmma ? wgmma_joints(joints)
                                                   : 2 * joint_pairs(joints)),
          cpu(joints, {3 + kCondition, kWidth, kWidth, 3 * kHead, kHead, 3}, false) {
        const int64_t widths[] = {3 + kCondition, kWidth, kWidth, 2 * kHead, kHead, kHead, 3};
        const bool cluster = layout == CudaLayout::cluster;
        const int64_t rows = cluster ? 8 * cluster_joint_groups(joints) : all_joints, poses = cluster ? 1 : kTilePoses;
        for (int i = 0; i < 7; ++i) {
            offsets[i] = tile_bytes;
            tile_bytes += rows * poses * 16 * channel_blocks(widths[i]) * (i == 6 ? 4 : int64_t{sizeof(T)});
        }
        attention = tile_bytes;
        tile_bytes += int64_t{4} * rows * rows * poses;
        if (layout == CudaLayout::wgmma) tile_bytes += kWgmmaStagingBytes;

        graph_conv(0, 1, 1, -1, 3 + kCondition, kWidth, true);
        graph_conv(1, 2, 2, -1, kWidth, kWidth, true);
        graph_conv(2, 1, 1, 1, kWidth, kWidth, false);
        cpu.add(ScaleShiftLayer{1, 1, false, 0.0f, kWidth, 0});
        records.back().film = 1;  // before it is stored
        scale_shift();
        const auto qkv_weight = normal(kWidth * 3 * kHead, 0.15f), qkv_bias = normal(3 * kHead);
        cpu.add(LinearLayer{2, 3, -1, kWidth, 3 * kHead, qkv_weight.data(), qkv_bias.data(), false});
        linear_record(2, 3, columns(qkv_weight, 0, 2 * kHead), qkv_bias.data(), 2 * kHead);
        attend(LayerKind::attention_weights, 3, 3, 2 * kHead);
        linear_record(2, 4, columns(qkv_weight, 2 * kHead, kHead), qkv_bias.data() + 2 * kHead, kHead);
        cpu.add(AttentionLayer{3, 4, 1, kHead});
        attend(LayerKind::attention_apply, 4, 5, kHead);
        linear(4, 5, 1, kHead, kWidth);
        graph_conv(1, 5, 6, -1, kWidth, 3, false);
        records.back().output_is_float = 1;
    }

    LayerRecord& record(LayerKind kind, int input, int output, int64_t c_in, int64_t c_out) {
        LayerRecord next{};
        next.kind = kind;
        next.input_blocks = static_cast<int32_t>(channel_blocks(c_in)),
        next.output_blocks = static_cast<int32_t>(channel_blocks(c_out));
        next.input = offsets[input], next.output = offsets[output], next.residual = -1, next.weights = attention;
        next.num_heads = 1;
        records.push_back(next);
        return records.back();
    }

    const float* keep(const float* values, int64_t rows, int64_t columns_, int64_t all_rows, int64_t stride) {
        kept.push_back(padded(values, rows, columns_, all_rows, stride));
        return kept.back().data();
    }
    const void* keep_weight(const DeviceArray<float>& weight, int64_t k, int64_t n, int64_t products) {
        if constexpr (sizeof(T) == 2) {
            weights.push_back((layout == CudaLayout::cluster ? packed_for_cluster
                               : layout == CudaLayout::wgmma ? packed_for_wgmma
                                                             : packed<T>)(weight, k, n, products));
        } else {
            weights.push_back(packed<T>(weight, k, n, products));
        }
        return weights.back().data();
    }
    const float* keep_factors(const float* values, int64_t n) {
        if (layout == CudaLayout::pairs) return keep(values, joints, n, all_joints, 16 * channel_blocks(n));
        kept.push_back(layout == CudaLayout::cluster ? by_channel(values, joints, n)
                                                     : factors_for_wgmma(values, joints, n));
        return kept.back().data();
    }
    const float* keep_bias(const float* values, int64_t n) {
        if (layout != CudaLayout::cluster) return keep(values, 1, n, 1, 16 * channel_blocks(n));
        kept.push_back(by_channel(values, joints, n, true));
        return kept.back().data();
    }

    // Buffers of the C++ engine. `gpu_output` is a buffer of the CUDA engine; input buffers have the same numbers in
    // both.
    void graph_conv(int input, int cpu_output, int gpu_output, int residual, int64_t c_in, int64_t c_out, bool relu) {
        const auto weight = normal(c_in * 2 * c_out, 0.5f / std::sqrt(static_cast<float>(c_in)));
        const auto own = normal(joints * c_out), neighbors = normal(joints * c_out), bias = normal(c_out, 0.2f);
        auto adjacency = normal(joints * joints, 0.2f);
        for (int64_t j = 0; j < joints; ++j) adjacency[j * (joints + 1)] = 0.0f;
        cpu.add(GraphConvLayer{input, cpu_output, residual, relu ? Activation::relu : Activation::gelu, c_in, c_out,
                               weight.data(), own.data(), neighbors.data(), adjacency.data(), bias.data()});
        LayerRecord& next = record(LayerKind::graph_conv, input, gpu_output, c_in, c_out);
        next.activation = relu ? Activation::relu : Activation::gelu;
        if (residual >= 0) next.residual = offsets[residual];
        next.weight = keep_weight(weight, c_in, c_out, 2);
        next.own = keep_factors(own.data(), c_out), next.neighbors = keep_factors(neighbors.data(), c_out);
        if (layout == CudaLayout::wgmma) {
            for (int64_t i = 0; i < joints; ++i) {
                for (int64_t j = 0; j < i; ++j) std::swap(adjacency[i * joints + j], adjacency[j * joints + i]);
            }
        }
        next.adjacency = keep(adjacency.data(), joints, joints, all_joints, kAdjacencyStride);
        next.bias = keep_bias(bias.data(), c_out);
    }

    static DeviceArray<float> columns(const DeviceArray<float>& weight, int64_t first, int64_t count) {
        const int64_t all = 3 * kHead, rows = weight.size() / all;
        DeviceArray<float> part(rows * count);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(weight.data() + i * all + first, count, part.data() + i * count);
        return part;
    }
    LayerRecord& linear_record(int input, int output, const DeviceArray<float>& weight, const float* bias,
                               int64_t c_out) {
        const int64_t c_in = weight.size() / c_out;
        LayerRecord& next = record(LayerKind::linear, input, output, c_in, c_out);
        next.weight = keep_weight(weight, c_in, c_out, 1);
        next.bias = keep_bias(bias, c_out);
        return next;
    }
    void linear(int cpu_input, int gpu_input, int output, int64_t c_in, int64_t c_out) {
        const auto weight = normal(c_in * c_out, 0.2f), bias = normal(c_out);
        cpu.add(LinearLayer{cpu_input, output, output, c_in, c_out, weight.data(), bias.data(), false});
        linear_record(gpu_input, output, weight, bias.data(), c_out).residual = offsets[output];
    }
    void attend(LayerKind kind, int input, int output, int64_t c_in) { record(kind, input, output, c_in, kHead); }
    void scale_shift() {
        cpu.add(ScaleShiftLayer{1, 2, true, 1e-5f, kWidth, 2 * cpu.padded(kWidth)});
        LayerRecord& next = record(LayerKind::scale_shift, 1, 2, kWidth, kWidth);
        next.channels = kWidth, next.normalize = 1, next.eps = 1e-5f, next.parameters = 2 * kWidth;
    }

    CudaProgram program() const {
        return {records.data(), records.data(), static_cast<int>(records.size()),
                joints,         kCondition,     3,
                offsets[0],     offsets[6],     tile_bytes,
                sizeof(T) == 2, layout};
    }

    int joints;
    CudaLayout layout;
    int64_t all_joints;  // with the padded ones
    Engine cpu;
    int64_t offsets[7] = {}, tile_bytes = 0, attention = 0;
    std::vector<LayerRecord> records;
    std::deque<DeviceArray<float>> kept;  // a deque, since records point into it
    std::deque<DeviceArray<T>> weights;
};

}  // namespace diffupose::cases
