// The CUDA engine's binding: records of layers as bytes, which Python keeps on the host and on the device.
#include "engine/cuda/engine_cuda.h"

#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>

#include "bind/bind.h"
#include "bind/checks.h"
#include "philox_normal/philox_normal.h"

namespace py = pybind11;

namespace diffupose {
namespace {

LayerKind kind_of(const std::string& name) {
    if (name == "graph_conv") return LayerKind::graph_conv;
    if (name == "linear") return LayerKind::linear;
    if (name == "scale_shift") return LayerKind::scale_shift;
    if (name == "attention_weights") return LayerKind::attention_weights;
    require(name == "attention_apply", "kind is not one of a layer");
    return LayerKind::attention_apply;
}

CudaLayout layout_of(const std::string& name) {
    if (name == "pairs") return CudaLayout::pairs;
    if (name == "wgmma") return CudaLayout::wgmma;
    require(name == "cluster", "layout must be pairs, wgmma or cluster");
    return CudaLayout::cluster;
}

const float* numbers(uintptr_t address) { return reinterpret_cast<const float*>(address); }

py::bytes layer_record(const std::string& kind, const std::string& activation, int input_blocks, int output_blocks,
                       int channels, int num_heads, bool bias_per_joint, bool normalize, bool output_is_float,
                       bool film, float eps, int64_t input, int64_t output, int64_t residual, int64_t weights,
                       int64_t parameters, uintptr_t weight, uintptr_t own, uintptr_t neighbors, uintptr_t adjacency,
                       uintptr_t bias) {
    LayerRecord record;
    std::memset(&record, 0, sizeof(record));  // its padding too: equal layers are equal bytes
    record.kind = kind_of(kind), record.activation = activation_of(activation);
    record.input_blocks = input_blocks, record.output_blocks = output_blocks;
    record.channels = channels, record.num_heads = num_heads;
    record.bias_per_joint = bias_per_joint, record.normalize = normalize, record.output_is_float = output_is_float;
    record.film = film;
    record.eps = eps;
    record.input = input, record.output = output, record.residual = residual, record.weights = weights;
    record.parameters = parameters;
    record.weight = reinterpret_cast<const void*>(weight);
    record.own = numbers(own), record.neighbors = numbers(neighbors), record.adjacency = numbers(adjacency);
    record.bias = numbers(bias);
    const bool product = is_product(record);
    require(input_blocks >= 1 && output_blocks >= 1, "a layer has a step at least");
    require(num_heads >= 1 && parameters >= 0, "num_heads must be at least 1, parameters not negative");
    const bool attention = record.kind == LayerKind::attention_weights || record.kind == LayerKind::attention_apply;
    require(input >= 0 && output >= 0 && residual >= -1 && weights >= (attention ? 0 : -1),
            "offsets must not be negative; -1 is none of residual and weights");
    require(!product || (weight != 0 && bias != 0), "weight and bias must not be null");
    require(record.kind != LayerKind::graph_conv || (own != 0 && neighbors != 0 && adjacency != 0),
            "own, neighbors and adjacency must not be null");
    return {reinterpret_cast<const char*>(&record), sizeof(record)};
}

struct CudaEngine {
    py::bytes layers;  // what the program points into
    CudaProgram program;
};

CudaEngine make_engine(const py::bytes& layers, uintptr_t layers_cuda, int num_joints, int num_condition_channels,
                       int num_output_channels, int64_t input, int64_t output, int64_t tile_bytes, bool bfloat16,
                       const std::string& layout_name) {
    const CudaLayout layout = layout_of(layout_name);
    const bool wgmma = layout == CudaLayout::wgmma, cluster = layout == CudaLayout::cluster;
    const auto size = static_cast<std::size_t>(py::len(layers));
    require(size > 0 && size % sizeof(LayerRecord) == 0, "layers must be records, one after the other");
    require(num_joints >= 1 && num_joints <= kCudaMaxJoints, "num_joints must lie in [1, 18]");
    require(!wgmma || (bfloat16 && num_joints <= kWgmmaMaxJoints), "wgmma takes bfloat16 and 17 joints at most");
    require(!cluster || bfloat16, "clusters take bfloat16 only");
    require(num_condition_channels >= 0 && num_output_channels >= 3, "the output must be at least 3 wide");
    require(input >= 0 && output >= 0 && input < tile_bytes && output < tile_bytes,
            "input and output must lie within tile_bytes");
    require(!cluster || tile_bytes % 16 == 0, "tile_bytes of a cluster must be a multiple of 16");
    require(!wgmma || tile_bytes >= kWgmmaStagingBytes, "tile_bytes must hold what wgmma stages");
    const CudaProgram program = {reinterpret_cast<const LayerRecord*>(PyBytes_AS_STRING(layers.ptr())),
                                 pointer<const LayerRecord>(layers_cuda, 1, "layers_cuda"),
                                 static_cast<int>(size / sizeof(LayerRecord)),
                                 num_joints,
                                 num_condition_channels,
                                 num_output_channels,
                                 input,
                                 output,
                                 tile_bytes,
                                 bfloat16,
                                 layout};
    return {layers, program};
}

int64_t tiles_of(int64_t poses) { return (poses + kTilePoses - 1) / kTilePoses; }

void denoise(const CudaEngine& engine, uintptr_t sample, uintptr_t condition, uintptr_t parameters, int64_t num_poses,
             uintptr_t workspace, uintptr_t out, uintptr_t stream) {
    require(num_poses >= 0, "num_poses must not be negative");
    require(tiles_of(numel_of({num_poses})) < int64_t{1} << 31, "num_poses must be below 2^34");
    require(engine.program.layout == CudaLayout::pairs, "a program for wgmma or clusters only samples");
    if (num_poses == 0) return;
    const CudaDenoiseArgs args = {pointer<const float>(sample, 1, "sample"),
                                  pointer<const float>(condition, engine.program.num_condition_channels, "condition"),
                                  numbers(parameters), num_poses, pointer<float>(out, 1, "out")};
    launch_denoise(engine.program, args, pointer<unsigned char>(workspace, 1, "workspace"),
                   reinterpret_cast<void*>(stream));
}

void sample(const CudaEngine& engine, uintptr_t condition, uintptr_t coefficients, uintptr_t noise_scale,
            uintptr_t parameters, int64_t num_parameters, uintptr_t seed, uintptr_t frame_ids, uintptr_t hypothesis_ids,
            std::optional<float> clip, int64_t num_frames, int64_t num_hypotheses, int num_steps, uintptr_t x0_last,
            uintptr_t out, uintptr_t workspace, int num_blocks, uintptr_t stream) {
    require(num_frames >= 0 && num_hypotheses >= 0, "num_frames and num_hypotheses must not be negative");
    const int64_t num_poses = numel_of({num_frames, num_hypotheses});
    require(tiles_of(num_poses) < int64_t{1} << 31, "num_frames num_hypotheses must be below 2^34");
    require(num_steps >= 1 && num_steps < kPhiloxMaxStep, "num_steps must lie in [1, 65534]");
    require(num_blocks >= 0, "num_blocks must not be negative");
    require(!clip || !std::isnan(*clip), "clip must be a number");
    if (num_poses == 0) return;
    const CudaSampleArgs args = {pointer<const float>(condition, engine.program.num_condition_channels, "condition"),
                                 pointer<const float>(coefficients, 1, "coefficients"),
                                 numbers(noise_scale),
                                 numbers(parameters),
                                 pointer<const int64_t>(seed, 1, "seed"),
                                 pointer<const int64_t>(frame_ids, 1, "frame_ids"),
                                 pointer<const int64_t>(hypothesis_ids, 1, "hypothesis_ids"),
                                 num_parameters,
                                 num_frames,
                                 num_hypotheses,
                                 num_steps,
                                 clip.value_or(std::numeric_limits<float>::infinity()),
                                 reinterpret_cast<float*>(x0_last),
                                 pointer<float>(out, 1, "out")};
    const CudaLayout layout = engine.program.layout;
    require(num_blocks > 0 || layout == CudaLayout::pairs, "a program for wgmma or clusters is sampled by one kernel");
    if (layout == CudaLayout::wgmma) {
        launch_sample_wgmma(engine.program, args, num_blocks, reinterpret_cast<void*>(stream));
    } else if (layout == CudaLayout::cluster) {
        launch_sample_clusters(engine.program, args, num_blocks, reinterpret_cast<void*>(stream));
    } else if (num_blocks > 0) {
        require(engine.program.bfloat16, "the persistent kernel takes bfloat16 only");
        launch_sample_persistent(engine.program, args, num_blocks, reinterpret_cast<void*>(stream));
    } else {
        launch_sample_layers(engine.program, args, pointer<unsigned char>(workspace, 1, "workspace"),
                             reinterpret_cast<void*>(stream));
    }
}

}  // namespace

void bind_engine_cuda(py::module_& m) {
    m.attr("TILE_POSES") = kTilePoses;
    m.attr("ADJACENCY_STRIDE") = kAdjacencyStride;
    m.attr("MAX_JOINTS") = kCudaMaxJoints;
    m.attr("WGMMA_MAX_JOINTS") = kWgmmaMaxJoints;
    m.attr("WGMMA_ROUND_BLOCKS") = kWgmmaRoundBlocks;
    m.attr("WGMMA_BLOCKS_AHEAD") = kWgmmaBlocksAhead;
    m.attr("WGMMA_STAGING_BYTES") = kWgmmaStagingBytes;
    m.def("joint_pairs", &joint_pairs, py::arg("joints"));
    m.def("wgmma_joints", &wgmma_joints, py::arg("joints"));
    m.def("wgmma_available", &wgmma_available);
    m.def("cluster_joint_groups", &cluster_joint_groups, py::arg("joints"));
    m.def("cluster_bytes", &cluster_bytes, py::arg("tile_bytes"), py::arg("num_layers"));
    m.def("clusters_available", &clusters_available, py::arg("num_joints"), py::arg("shared_bytes"));
    m.def("layer_record", &layer_record, py::kw_only(), py::arg("kind"), py::arg("activation") = "none",
          py::arg("input_blocks"), py::arg("output_blocks"), py::arg("channels") = 0, py::arg("num_heads") = 1,
          py::arg("bias_per_joint") = false, py::arg("normalize") = false, py::arg("output_is_float") = false,
          py::arg("film") = false, py::arg("eps") = 0.0f, py::arg("input"), py::arg("output"), py::arg("residual") = -1,
          py::arg("weights") = -1, py::arg("parameters") = 0, py::arg("weight") = 0, py::arg("own") = 0,
          py::arg("neighbors") = 0, py::arg("adjacency") = 0, py::arg("bias") = 0);
    py::class_<CudaEngine> type(m, "CudaEngine");
    type.def(py::init(&make_engine), py::kw_only(), py::arg("layers"), py::arg("layers_cuda"), py::arg("num_joints"),
             py::arg("num_condition_channels"), py::arg("num_output_channels"), py::arg("input"), py::arg("output"),
             py::arg("tile_bytes"), py::arg("bfloat16"), py::arg("layout") = "pairs");
    define_without_gil(type, "denoise", &denoise, "sample", "condition", "parameters", "num_poses", "workspace", "out",
                       "stream");
    // num_blocks 0: a kernel for each layer. Otherwise one kernel of num_blocks thread blocks or clusters, which needs
    // no workspace.
    define_without_gil(type, "sample", &sample, "condition", "coefficients", "noise_scale", "parameters",
                       "num_parameters", "seed", "frame_ids", "hypothesis_ids", "clip", "num_frames", "num_hypotheses",
                       "num_steps", "x0_last", "out", "workspace", "num_blocks", "stream");
}

}  // namespace diffupose
