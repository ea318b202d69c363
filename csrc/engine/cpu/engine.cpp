#include "engine/cpu/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "common/parallel.h"
#include "philox_normal/philox.h"
#include "philox_normal/philox_normal.h"
#include "reverse_step/reverse_step_row.h"

namespace diffupose {
namespace {

constexpr int64_t kMaxJoints = 64;
// Activations of one tile: a quarter of a core's L2 cache, through which the weights pass as well. With 1 MiB of L2,
// half of this made a step of the released network 10 to 20 % slower.
constexpr int64_t kTileBytes = 256 << 10;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Engine::Engine(int64_t num_joints, std::vector<int64_t> widths, bool bfloat16)
    : joints_(num_joints),
      widths_(std::move(widths)),
      bfloat16_(bfloat16),
      isa_(active_isa()),
      kernels_(kernels_of(isa_)) {
    require(joints_ >= 1 && joints_ <= kMaxJoints, "num_joints must lie in [1, 64], got " + std::to_string(joints_));
    require(widths_.size() >= 2, "widths must hold an input and an output at least");
    for (const int64_t width : widths_) require(width >= 1, "every width must be at least 1");
    require(widths_.front() >= 3, "the input must be at least 3 wide, for x_t");
    require(widths_.back() >= 3, "the output must be at least 3 wide, for the prediction");
}

int64_t Engine::padded(int64_t channels) const { return round_up(channels, 2 * kernels_.lanes); }

int64_t Engine::check_buffer(int buffer, int64_t channels, const char* name) const {
    require(buffer >= 0 && buffer < static_cast<int>(widths_.size()), std::string(name) + " is not a buffer");
    require(channels >= 1 && channels <= widths_[buffer], std::string(name) + " is too narrow for its layer");
    return padded(widths_[buffer]);
}

int64_t Engine::check_output(int output, int residual, int64_t channels) const {
    const int64_t stride = check_buffer(output, channels, "output");
    require(residual < 0 || check_buffer(residual, channels, "residual") == stride,
            "residual must be as wide as the output");
    return stride;
}

const float* Engine::keep(const float* values, int64_t rows, int64_t columns, int64_t stride) {
    memory_.push_back(aligned_bytes(rows * stride * 4));
    auto* kept = reinterpret_cast<float*>(memory_.back().get());
    for (int64_t row = 0; row < rows; ++row) std::copy_n(values + row * columns, columns, kept + row * stride);
    weight_bytes_ += rows * stride * 4;
    return kept;
}

const void* Engine::keep_packed(const float* weight, int64_t k, int64_t columns, bool interleaved) {
    // Interleaved panels hold `lanes` columns of either half, and the last panel may be incomplete.
    const int64_t most = interleaved ? 2 * padded(columns / 2) : columns;
    const int64_t bytes = kernels_.packed_bytes(k, most, bfloat16_);
    memory_.push_back(aligned_bytes(bytes));
    kernels_.pack(weight, k, columns, interleaved, bfloat16_, memory_.back().get());
    weight_bytes_ += bytes;
    largest_k_ = std::max(largest_k_, k);
    return memory_.back().get();
}

void Engine::add(const GraphConvLayer& layer) {
    GraphConvArgs args{};
    args.x_stride = check_buffer(layer.input, layer.c_in, "input");
    args.y_stride = check_output(layer.output, layer.residual, layer.c_out);
    require(layer.input != layer.output, "a graph convolution cannot overwrite its input");
    const int64_t lanes = kernels_.lanes;
    args.weight = {keep_packed(layer.weight, layer.c_in, 2 * layer.c_out, true), layer.c_in,
                   (layer.c_out + lanes - 1) / lanes};
    args.own = keep(layer.own, joints_, layer.c_out, args.y_stride);
    args.neighbors = keep(layer.neighbors, joints_, layer.c_out, args.y_stride);
    args.adjacency = keep(layer.adjacency, joints_, joints_, joints_);
    args.bias = keep(layer.bias, 1, layer.c_out, args.y_stride);
    args.activation = layer.activation;
    layers_.push_back({args, layer.input, layer.output, layer.residual, 0});
}

void Engine::add(const LinearLayer& layer) {
    LinearArgs args{};
    args.x_stride = check_buffer(layer.input, layer.c_in, "input");
    args.y_stride = check_output(layer.output, layer.residual, layer.c_out);
    require(layer.input != layer.output, "a linear layer cannot overwrite its input");
    const int64_t panel = 2 * kernels_.lanes;
    args.weight = {keep_packed(layer.weight, layer.c_in, layer.c_out, false), layer.c_in,
                   (layer.c_out + panel - 1) / panel};
    args.bias = keep(layer.bias, layer.bias_per_joint ? joints_ : 1, layer.c_out, args.y_stride);
    args.bias_stride = layer.bias_per_joint ? args.y_stride : 0;
    layers_.push_back({args, layer.input, layer.output, layer.residual, 0});
}

void Engine::add(const ScaleShiftLayer& layer) {
    ScaleShiftArgs args{};
    args.normalize = layer.normalize;
    args.eps = layer.eps;
    args.channels = layer.channels;
    args.stride = check_buffer(layer.input, layer.channels, "input");
    require(check_buffer(layer.output, layer.channels, "output") == args.stride, "output must be as wide as the input");
    require(layer.offset >= 0 && layer.offset % (2 * kernels_.lanes) == 0, "offset must be a multiple of a panel");
    num_parameters_ = std::max(num_parameters_, layer.offset + 2 * padded(layer.channels));
    layers_.push_back({args, layer.input, layer.output, -1, layer.offset});
}

void Engine::add(const AttentionLayer& layer) {
    AttentionArgs args{};
    require(layer.num_heads >= 1 && layer.channels >= 1, "attention needs a head and a channel at least");
    args.num_heads = layer.num_heads;
    args.channels = layer.channels;
    const int64_t width = layer.num_heads * layer.channels;
    args.x_stride = check_buffer(layer.input, 3 * width, "input");
    args.y_stride = check_buffer(layer.output, width, "output");
    require(layer.input != layer.output, "attention cannot overwrite its input");
    largest_head_ = std::max(largest_head_, layer.channels);
    layers_.push_back({args, layer.input, layer.output, -1, 0});
}

namespace {

// Asks at most every 50 ms. Only the caller's thread uses it.
class Watch {
   public:
    explicit Watch(const std::function<bool()>& interrupted) : interrupted_(interrupted), last_(now()) {}
    bool stop() {
        if (now() - last_ < std::chrono::milliseconds(50)) return false;
        last_ = now();
        return interrupted_();
    }

   private:
    static std::chrono::steady_clock::time_point now() { return std::chrono::steady_clock::now(); }
    const std::function<bool()>& interrupted_;
    std::chrono::steady_clock::time_point last_;
};

}  // namespace

// The activations of the poses that a team works on.
struct Engine::Tile {
    std::vector<float*> buffers;
    float *x, *x0;  // [poses, J, 3]; x0 is null for one-step samplers
};

struct Engine::Team {
    Barrier barrier;
    std::atomic<bool> stop{false};
};

int64_t Engine::scratch_bytes(int64_t poses) const {
    return round_up(kernels_.scratch_bytes({poses, joints_}, largest_k_, largest_head_), kAlignment);
}

void Engine::run_layers(const Tile& tile, int64_t poses, const float* parameters, Team& team, int part, int parts,
                        void* scratch) const {
    const Rows rows{poses, joints_};
    const Part mine{part, parts};
    for (const Packed& layer : layers_) {
        const float* x = tile.buffers[layer.input];
        float* y = tile.buffers[layer.output];
        const float* residual = layer.residual < 0 ? nullptr : tile.buffers[layer.residual];
        if (const auto* packed = std::get_if<GraphConvArgs>(&layer.args)) {
            GraphConvArgs args = *packed;
            args.rows = rows, args.x = x, args.y = y, args.residual = residual;
            kernels_.graph_conv(args, bfloat16_, mine, scratch);
        } else if (const auto* packed = std::get_if<LinearArgs>(&layer.args)) {
            LinearArgs args = *packed;
            args.rows = rows, args.x = x, args.y = y, args.residual = residual;
            kernels_.linear(args, bfloat16_, mine, scratch);
        } else if (const auto* packed = std::get_if<ScaleShiftArgs>(&layer.args)) {
            ScaleShiftArgs args = *packed;
            args.rows = rows, args.x = x, args.y = y;
            args.scale = parameters + layer.offset;
            args.shift = args.scale + padded(args.channels);
            kernels_.scale_shift(args, mine);
        } else {
            AttentionArgs args = std::get<AttentionArgs>(layer.args);
            args.rows = rows, args.x = x, args.y = y;
            kernels_.attention(args, mine, scratch);
        }
        team.barrier.wait(parts);
    }
}

// Cuts the poses into tiles and gives every team its memory. Calls
// work(tile, first_pose, poses, team, part, parts, scratch, leave) for each tile, until the caller interrupts.
template <typename Work>
bool Engine::run(int64_t num_poses, int num_threads, bool with_history, const std::function<bool()>& interrupted,
                 const Work& work) const {
    if (num_poses == 0) return true;
    require(num_threads >= 1, "num_threads must be at least 1");
    int64_t row_floats = 0;
    for (const int64_t width : widths_) row_floats += padded(width);
    const int64_t pose_bytes = joints_ * row_floats * 4;
    const int64_t largest = std::max<int64_t>(1, kTileBytes / pose_bytes);
    // Fewer poses than threads: one team takes all poses, and each thread some columns of each layer.
    const bool together = num_poses < num_threads;
    const int64_t teams = together ? 1 : num_threads;
    // The same number of tiles for every team, of nearly equal size.
    const int64_t rounds = (num_poses + teams * largest - 1) / (teams * largest);
    const int64_t tiles = together ? (num_poses + largest - 1) / largest : std::min(teams * rounds, num_poses);
    const int64_t most = (num_poses + tiles - 1) / tiles;

    const int64_t state = round_up(most * joints_ * 3 * 4, kAlignment);
    // A layer may read one vector beyond its buffer. This room keeps it out of the next buffer, where another thread
    // may write.
    const int64_t tile_bytes =
        most * pose_bytes + (with_history ? 2 : 1) * state + static_cast<int64_t>(widths_.size()) * kAlignment;
    const int64_t scratch = scratch_bytes(most);
    const AlignedBytes tile_memory = aligned_bytes(teams * tile_bytes);
    const AlignedBytes scratch_memory = aligned_bytes(num_threads * scratch);
    std::vector<Team> all_teams(teams);
    Watch watch(interrupted);
    std::atomic<bool> stopped{false};
    std::atomic<int64_t> next_tile{0};
    std::atomic<int> finished{0};
    parallel(num_threads, [&](int thread, int count) {
        const int64_t team_index = together ? 0 : thread;
        const int part = together ? thread : 0, parts = together ? count : 1;
        Team& team = all_teams[team_index];
        char* memory = tile_memory.get() + team_index * tile_bytes;
        Tile tile;
        tile.x = reinterpret_cast<float*>(memory);
        tile.x0 = with_history ? reinterpret_cast<float*>(memory + state) : nullptr;
        memory += (with_history ? 2 : 1) * state;
        for (const int64_t width : widths_) {
            tile.buffers.push_back(reinterpret_cast<float*>(memory));
            memory += most * joints_ * padded(width) * 4 + kAlignment;
        }
        // A free thread takes the next tile, so that a thread which loses its core for a while does not delay the
        // others.
        const auto after = [&](int64_t index) { return together ? index + 1 : next_tile.fetch_add(1); };
        for (int64_t index = after(-1); index < tiles; index = after(index)) {
            const int64_t first = num_poses * index / tiles, last = num_poses * (index + 1) / tiles;
            // True if the caller has interrupted. Only the caller's thread asks; the others read its answer.
            const auto leave = [&] {
                if (thread == 0 && watch.stop()) stopped.store(true);
                return stopped.load(std::memory_order_relaxed);
            };
            work(tile, first, last - first, team, part, parts, scratch_memory.get() + thread * scratch, leave);
            if (stopped.load(std::memory_order_relaxed)) break;
            team.barrier.wait(parts);
        }
        finished.fetch_add(1);
        // The other threads may still have a whole chain to do, which the caller must be able to interrupt.
        while (thread == 0 && finished.load() < count) {
            if (watch.stop()) stopped.store(true);
            std::this_thread::yield();
        }
    });
    return !stopped.load();
}

namespace {

// The input buffer of some rows: x_t beside the condition.
void fill_input(float* buffer, int64_t stride, const float* x, const float* condition, int64_t channels, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, buffer += stride, x += 3, condition += channels) {
        buffer[0] = x[0], buffer[1] = x[1], buffer[2] = x[2];
        std::copy_n(condition, channels, buffer + 3);
    }
}

}  // namespace

bool Engine::sample(const SampleArgs& args, const std::function<bool()>& interrupted) const {
    const int64_t elements = joints_ * 3, channels = widths_.front() - 3, count = args.num_hypotheses;
    const int64_t in_stride = padded(widths_.front()), out_stride = padded(widths_.back());
    bool with_history = false;
    for (int64_t step = 0; step < args.num_steps; ++step) with_history |= args.coefficients[6 * step + 4] != 0.0f;
    const PhiloxKey key = {static_cast<uint32_t>(args.noise.seed), static_cast<uint32_t>(args.noise.seed >> 32)};

    const auto draw = [&](int64_t pose, uint32_t step, float* z) {
        const auto frame = static_cast<uint64_t>(args.noise.frame_ids[pose / count]);
        const auto id = static_cast<uint32_t>(args.noise.hypothesis_ids[pose % count]);
        philox_normal_row(key, frame, id, step, elements, z);
    };
    const auto work = [&](const Tile& tile, int64_t first, int64_t poses, Team& team, int part, int parts,
                          void* scratch, const auto& leave) {
        const bool leads = part == 0;
        float z[kMaxJoints * 3];
        if (leads) {
            for (int64_t i = 0; i < poses; ++i) draw(first + i, kPhiloxMaxStep, tile.x + i * elements);
        }
        for (int64_t step = 0; step < args.num_steps; ++step) {
            if (leads) {
                team.stop.store(leave());
                for (int64_t i = 0; i < poses; ++i) {
                    fill_input(tile.buffers.front() + i * joints_ * in_stride, in_stride, tile.x + i * elements,
                               args.condition + (first + i) / count * joints_ * channels, channels, joints_);
                }
            }
            team.barrier.wait(parts);
            if (team.stop.load()) return;
            run_layers(tile, poses, args.parameters + step * num_parameters_, team, part, parts, scratch);
            if (!leads) continue;
            const float* row = args.coefficients + 6 * step;
            const float* scale = args.noise_scale == nullptr ? nullptr : args.noise_scale + step * elements;
            for (int64_t i = 0; i < poses; ++i) {
                if (row[5] != 0.0f) draw(first + i, static_cast<uint32_t>(step), z);
                const float* output = tile.buffers.back() + i * joints_ * out_stride;
                float* x0 = tile.x0 == nullptr ? nullptr : tile.x0 + i * elements;
                reverse_step_row(row, args.clip, joints_, output, out_stride, z, scale, tile.x + i * elements, x0);
            }
        }
        if (leads) std::copy_n(tile.x, poses * elements, args.out + first * elements);
    };
    return run(args.num_frames * count, args.num_threads, with_history, interrupted, work);
}

bool Engine::denoise(const DenoiseArgs& args, const std::function<bool()>& interrupted) const {
    const int64_t channels = widths_.front() - 3, out_channels = widths_.back();
    const int64_t in_stride = padded(widths_.front()), out_stride = padded(out_channels);
    const auto work = [&](const Tile& tile, int64_t first, int64_t poses, Team& team, int part, int parts,
                          void* scratch, const auto& leave) {
        const int64_t rows = poses * joints_;
        if (part == 0) {
            team.stop.store(leave());
            fill_input(tile.buffers.front(), in_stride, args.sample + first * joints_ * 3,
                       args.condition + first * joints_ * channels, channels, rows);
        }
        team.barrier.wait(parts);
        if (team.stop.load()) return;
        run_layers(tile, poses, args.parameters, team, part, parts, scratch);
        if (part != 0) return;
        float* out = args.out + first * joints_ * out_channels;
        for (int64_t row = 0; row < rows; ++row) {
            std::copy_n(tile.buffers.back() + row * out_stride, out_channels, out + row * out_channels);
        }
    };
    return run(args.num_poses, args.num_threads, false, interrupted, work);
}

}  // namespace diffupose
