// A small engine built by hand, for sanitizers: every kind of layer, widths and joints that leave tails, tiles of
// several poses, fewer poses than threads. Results must be the same bits on every number of threads.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#include "engine/cpu/engine.h"

using diffupose::Activation;
using diffupose::Engine;

namespace {

std::mt19937 generator(1);

// Exactly as long as it is said to be, so that a read past its end is seen.
std::vector<float> random_numbers(int64_t count, float size = 0.3f) {
    std::normal_distribution<float> normal(0.0f, size);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = normal(generator);
    return values;
}

void check(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "engine_sanitize: %s\n", what);
    std::exit(1);
}

void add_graph_conv(Engine& engine, int64_t joints, int input, int output, int residual, Activation activation,
                    int64_t c_in, int64_t c_out) {
    const auto weight = random_numbers(c_in * 2 * c_out), own = random_numbers(joints * c_out, 1.0f),
               neighbors = random_numbers(joints * c_out, 1.0f), adjacency = random_numbers(joints * joints),
               bias = random_numbers(c_out);
    engine.add(diffupose::GraphConvLayer{input, output, residual, activation, c_in, c_out, weight.data(), own.data(),
                                         neighbors.data(), adjacency.data(), bias.data()});
}

void add_linear(Engine& engine, int64_t joints, int input, int output, int residual, int64_t c_in, int64_t c_out,
                bool bias_per_joint) {
    const auto weight = random_numbers(c_in * c_out), bias = random_numbers((bias_per_joint ? joints : 1) * c_out);
    engine.add(
        diffupose::LinearLayer{input, output, residual, c_in, c_out, weight.data(), bias.data(), bias_per_joint});
}

// `heads` x `channels` wide, in the order of the networks: what attention writes lies behind what it reads.
Engine small_engine(int64_t joints, int64_t heads, int64_t channels, int64_t condition, bool bfloat16) {
    const int64_t width = heads * channels, input = 3 + condition;
    Engine engine(joints, {input, width, width, 3 * width, width, 4}, bfloat16);
    add_linear(engine, joints, 0, 1, -1, input, width, true);
    engine.add(diffupose::ScaleShiftLayer{1, 2, true, 1e-5f, width, 0});
    add_linear(engine, joints, 2, 3, -1, width, 3 * width, false);
    engine.add(diffupose::AttentionLayer{3, 4, heads, channels});
    add_linear(engine, joints, 4, 1, 1, width, width, false);
    add_graph_conv(engine, joints, 1, 2, -1, Activation::gelu, width, width);
    add_graph_conv(engine, joints, 2, 1, 1, Activation::relu, width, width);
    engine.add(diffupose::ScaleShiftLayer{1, 1, false, 0.0f, width, 2 * engine.padded(width)});
    add_graph_conv(engine, joints, 1, 5, -1, Activation::none, width, 4);
    return engine;
}

void run(int64_t joints, int64_t heads, int64_t channels, int64_t condition_channels, bool bfloat16) {
    const Engine engine = small_engine(joints, heads, channels, condition_channels, bfloat16);
    const auto never = [] { return false; };
    constexpr int64_t kSteps = 3;
    const auto parameters = random_numbers(kSteps * engine.num_parameters());
    // p, q, c_x, c_0, c_1, s: a step with noise, one with history, the last one.
    const std::vector<float> table = {0, 1, 0.5f, 0.5f, 0, 0.7f, 0.3f, 0.7f, 0.2f, 0.5f, 0.3f, 0, 0, 1, 0, 1, 0, 0};
    const auto scale = random_numbers(kSteps * joints * 3, 1.0f);
    for (const int64_t frames : {1, 2, 3, 11}) {
        const int64_t hypotheses = frames == 11 ? 7 : 1, poses = frames * hypotheses;
        const auto condition = random_numbers(frames * joints * condition_channels);
        std::vector<int64_t> frame_ids, hypothesis_ids;
        for (int64_t i = 0; i < frames; ++i) frame_ids.push_back(100 - i);
        for (int64_t i = 0; i < hypotheses; ++i) hypothesis_ids.push_back(i);
        const auto x = random_numbers(frames * joints * 3, 1.0f);
        std::vector<float> first_sample, first_output;
        for (const int threads : {1, 2, 3}) {
            std::vector<float> sampled(static_cast<std::size_t>(poses * joints * 3), NAN);
            diffupose::SampleArgs sample{};
            sample.condition = condition.data();
            sample.coefficients = table.data();
            sample.noise_scale = scale.data();
            sample.parameters = parameters.data();
            sample.noise = {7, frame_ids.data(), hypothesis_ids.data()};
            sample.clip = 2.0f;
            sample.num_frames = frames;
            sample.num_hypotheses = hypotheses;
            sample.num_steps = kSteps;
            sample.num_threads = threads;
            sample.out = sampled.data();
            check(engine.sample(sample, never), "sample was interrupted");

            std::vector<float> output(static_cast<std::size_t>(frames * joints * 4), NAN);
            const diffupose::DenoiseArgs denoise = {x.data(), condition.data(), parameters.data(),
                                                    frames,   threads,          output.data()};
            check(engine.denoise(denoise, never), "denoise was interrupted");

            for (const float value : sampled) check(std::isfinite(value), "a sample is no number");
            for (const float value : output) check(std::isfinite(value), "an output is no number");
            if (threads == 1) {
                first_sample = sampled, first_output = output;
                continue;
            }
            check(std::memcmp(sampled.data(), first_sample.data(), sampled.size() * 4) == 0, "samples differ");
            check(std::memcmp(output.data(), first_output.data(), output.size() * 4) == 0, "outputs differ");
        }
    }
}

// A chain of so many steps that it would take seconds or minutes; returns what `sample` returns.
bool long_chain(int64_t frames, int threads, int64_t steps, const std::function<bool()>& interrupted) {
    const Engine engine = small_engine(17, 1, 5, 0, false);
    std::vector<float> table, parameters(static_cast<std::size_t>(steps * engine.num_parameters()));
    for (int64_t step = 0; step < steps; ++step) table.insert(table.end(), {0, 1, 0.5f, 0.5f, 0, 0});
    std::vector<int64_t> ids(static_cast<std::size_t>(frames));
    std::vector<float> out(static_cast<std::size_t>(frames * 17 * 3)), none(1);
    diffupose::SampleArgs sample{};
    sample.condition = none.data();
    sample.coefficients = table.data();
    sample.parameters = parameters.data();
    sample.noise = {7, ids.data(), ids.data()};
    sample.clip = 2.0f;
    sample.num_frames = frames;
    sample.num_hypotheses = 1;
    sample.num_steps = steps;
    sample.num_threads = threads;
    sample.out = out.data();
    return engine.sample(sample, interrupted);
}

// All threads leave when one is told to.
void interrupt(int64_t frames, int threads) {
    check(!long_chain(frames, threads, 60000, [] { return true; }), "sample was not interrupted");
}

// Of three poses two threads take one and two: the caller's thread is done when the other is half way, and still asks.
void interrupt_while_waiting() {
    using Clock = std::chrono::steady_clock;
    // Long enough to tell, on any machine.
    for (int64_t steps = 5000;; steps *= 2) {
        const Clock::time_point begin = Clock::now();
        Clock::time_point last = begin;
        const auto ask = [&] {
            last = Clock::now();
            return false;
        };
        check(long_chain(3, 2, steps, ask), "sample was interrupted");
        const Clock::duration total = Clock::now() - begin, silence = Clock::now() - last;
        if (total < std::chrono::milliseconds(500)) continue;
        check(silence < total / 4, "nobody asked whether to go on");
        return;
    }
}

}  // namespace

int main() {
    const auto isas = diffupose::usable_isas();
    for (const diffupose::Isa isa : isas) {
        setenv("DIFFUPOSE_ISA", diffupose::isa_name(isa), 1);
        for (const bool bfloat16 : {false, true}) {
            run(1, 1, 3, 0, bfloat16);
            run(17, 5, 1, 2, bfloat16);
            run(16, 2, 17, 3, bfloat16);
            run(17, 1, 35, 7, bfloat16);
        }
        interrupt(8, 2);
        interrupt(1, 3);
    }
    setenv("DIFFUPOSE_ISA", "portable", 1);
    interrupt_while_waiting();
    std::printf("engine_sanitize: %d instruction sets are clean\n", static_cast<int>(isas.size()));
}
