"""The CUDA engine: on a GPU where there is one, else emulated on the CPU from the same .cu files."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from support.plain_program import run_program, through_bfloat16
from support.random_denoisers import SKELETON_OF, denoiser_config, in_float64, random_denoiser, random_inputs
from support.random_layers import graph_conv, linear, program_of
from support.tiny_lifters import people, tiny_lifter

from diffupose import ops
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.cuda_plan import Layout, pack_program, unfit
from diffupose.engines.layer_program import Attention, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.errors import BackendUnavailableError
from diffupose.ops import _backend
from diffupose.schedule import NoiseSchedule, StepTable, step_table
from diffupose.testing import assert_parity, requires_cuda

STEP = torch.tensor([7])
# "persistent-mma" is the persistent kernel as GPUs other than Hopper's have it.
MODES = ["layers", "persistent", "persistent-mma", "cluster"]
RUNS = [("float32", "layers"), *(("bfloat16", mode) for mode in MODES)]
CONFIGS = {
    "paper": denoiser_config("paper", hidden_dim=32),
    "paper-mask": denoiser_config("paper", hidden_dim=64, condition_channels=3, adjacency_mask=True, num_layers=1),
    "paper-between": denoiser_config("paper", hidden_dim=32, time_blocks="between", num_layers=1),
    "base": denoiser_config("base", hidden_dim=64, num_heads=4, num_layers=1),
    "base-one-head": denoiser_config("base", hidden_dim=48, num_heads=1, camera_cue=True, num_layers=1),
    "base-no-attention": denoiser_config("base", hidden_dim=36, num_heads=0, num_layers=1),
}


@pytest.fixture
def gpu(device, request):
    """The device of the CUDA backend."""
    if device.type == "cpu":
        request.getfixturevalue("emulated_cuda")
    return device


def packed_of(program, gpu, precision="float32", mode=None):
    if mode == "cluster" and gpu.type == "cuda" and torch.cuda.get_device_capability(gpu) < (9, 0):
        pytest.skip("this GPU has no clusters")
    if mode != "persistent-mma":
        return CudaDenoiser(program, precision, gpu, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend.cuda(), "wgmma_available", lambda: False)
        return CudaDenoiser(program, precision, gpu, "persistent")


# --- Layers ----------------------------------------------------------------------------------------------------------


def few(mode, count):
    """So many, or one for clusters: emulated they take a while."""
    return 1 if mode == "cluster" else count


def assert_runs_like_its_formula(program, gpu, count=5, precision="float32"):
    joints, channels = program.num_joints, program.widths[0] - 3
    packed = packed_of(program, gpu, precision)
    inputs = torch.randn(count, joints, 3), torch.randn(count, joints, channels)
    if precision == "float32":
        assert_parity(
            lambda *arguments: packed.denoise(*arguments, STEP).cpu(),
            lambda sample, condition: run_program(program, sample, condition, STEP, sample.dtype),
            inputs,
        )
        return
    exact = run_program(program, *inputs, STEP, rounding=through_bfloat16, storing=through_bfloat16)
    error = (packed.denoise(*inputs, STEP).cpu() - exact).abs().max()
    assert error <= 1e-3 * exact.abs().max()  # NaN fails


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("joints", "c_in", "c_out", "activation"),
    [(1, 3, 3, "none"), (2, 5, 7, "relu"), (15, 3, 33, "gelu"), (16, 129, 16, "relu"), (17, 33, 129, "gelu"),
     (17, 384, 16, "none"), (18, 16, 31, "relu"), (17, 530, 16, "gelu"), (16, 530, 3, "relu"), (17, 20, 1040, "none"),
     (16, 3, 1040, "relu")],
)  # fmt: skip
def test_graph_convolution(gpu, joints, c_in, c_out, activation, precision):
    layer = graph_conv(0, 1, joints, c_in, c_out, activation=activation)
    program = program_of(layer, joints=joints, widths=(c_in, c_out))
    assert_runs_like_its_formula(program, gpu, precision=precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("joints", "c_in", "c_out"), [(1, 3, 3), (16, 4, 129), (17, 384, 3), (17, 530, 3), (18, 7, 33), (17, 4, 1040)]
)
@pytest.mark.parametrize("per_joint", [False, True], ids=["bias", "bias per joint"])
def test_linear_layer(gpu, joints, c_in, c_out, per_joint, precision):
    layer = linear(0, 1, joints, c_in, c_out)
    layer = layer if per_joint else replace(layer, bias=layer.bias[0])
    program = program_of(layer, joints=joints, widths=(c_in, c_out))
    assert_runs_like_its_formula(program, gpu, precision=precision)


@pytest.mark.parametrize(
    ("joints", "precision"), [(16, "bfloat16"), (17, "bfloat16"), (16, "float32"), (17, "float32")]
)
def test_a_pose_is_the_same_bits_however_layers_are_cut(gpu, joints, precision):
    """For many tiles a block takes 16 columns, for few 8; and tiles hold 3, 7 or 8 poses."""
    layers = (
        graph_conv(0, 1, joints, 5, 240, activation="relu"),
        linear(1, 2, joints, 240, 240, residual=1),
        graph_conv(2, 3, joints, 240, 3),
    )
    packed = packed_of(program_of(*layers, joints=joints, widths=(5, 240, 240, 3)), gpu, precision)
    sample, condition = torch.randn(40, joints, 3), torch.randn(40, joints, 2)
    expected = packed.denoise(sample, condition, STEP)
    for count in (3, 33):
        assert torch.equal(packed.denoise(sample[:count], condition[:count], STEP), expected[:count])


@pytest.mark.parametrize("joints", [1, 16, 17])
@pytest.mark.parametrize("width", [3, 33])
def test_a_residual_may_be_the_output_itself_or_another_buffer(gpu, joints, width):
    layers = (
        linear(0, 1, joints, 4, width),
        graph_conv(1, 2, joints, width, width, activation="relu", residual=1),
        graph_conv(2, 1, joints, width, width, activation="gelu", residual=1),
        linear(2, 1, joints, width, width, residual=1),
        linear(1, 3, joints, width, width, residual=2),
    )
    program = program_of(*layers, joints=joints, widths=(4, width, width, width))
    assert_runs_like_its_formula(program, gpu)


@pytest.mark.parametrize("joints", [1, 15, 17, 18])
@pytest.mark.parametrize(("num_heads", "channels"), [(1, 16), (3, 16), (2, 48)])
def test_attention(gpu, joints, num_heads, channels):
    width = num_heads * channels
    layers = (
        replace(linear(0, 1, joints, 5, 3 * width), weight=torch.randn(5, 3 * width) * 0.3),
        Attention(1, 2, num_heads, channels),
        linear(2, 3, joints, width, 3),
    )
    program = program_of(*layers, joints=joints, widths=(5, 3 * width, width, 3))
    assert_runs_like_its_formula(program, gpu, count=3)


@pytest.mark.parametrize("normalize", [False, True], ids=["silu", "normalised"])
@pytest.mark.parametrize("channels", [3, 16, 33, 129])
@pytest.mark.parametrize("in_place", [False, True])
def test_scale_and_shift(gpu, channels, normalize, in_place):
    layers = (
        linear(0, 1, 17, 5, channels),
        ScaleShift(1, 1 if in_place else 2, 0, channels, normalize, eps=1e-5),
        linear(1 if in_place else 2, 3, 17, channels, 3),
    )
    # An offset that is large against the spread: a variance from E[x^2] - E[x]^2 would lose its digits.
    layers = (replace(layers[0], bias=layers[0].bias + 30), *layers[1:])
    parameters = [(1 + torch.randn(1, channels), torch.randn(1, channels))]
    program = program_of(*layers, joints=17, widths=(5, channels, channels, 3), parameters=parameters)
    assert_runs_like_its_formula(program, gpu)


# --- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joints", [15, 16, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_the_module(gpu, name, joints):
    config = replace(CONFIGS[name], skeleton=SKELETON_OF[joints])
    net = random_denoiser(config)
    exact_net, packed = in_float64(net), packed_of(layer_program(net), gpu)
    assert_parity(
        lambda sample, condition: packed.denoise(sample, condition, STEP).cpu(),
        lambda sample, condition: net(sample, condition, STEP),
        random_inputs(config, 5),
        exact=lambda sample, condition: exact_net(sample, condition, STEP),
    )


@pytest.mark.parametrize("count", [0, 1, 8, 9, 33])
def test_parity_for_any_number_of_poses(gpu, count):
    config = CONFIGS["base"]
    net = random_denoiser(config)
    packed, inputs = packed_of(layer_program(net), gpu), random_inputs(config, count)
    out = packed.denoise(*inputs, STEP).cpu()
    assert out.shape == (count, 17, 3)
    assert torch.allclose(out, net(*inputs, STEP), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_near_as_the_formulas_with_rounded_numbers(gpu, name):
    config = CONFIGS[name]
    net = random_denoiser(config)
    program, inputs = layer_program(net), random_inputs(config, 5)
    exact = in_float64(net)(inputs[0].double(), inputs[1].double(), STEP)
    rounded = run_program(program, *inputs, STEP, torch.float32, through_bfloat16, through_bfloat16)
    error = (packed_of(program, gpu, "bfloat16").denoise(*inputs, STEP).cpu() - exact).abs().max()
    baseline, largest = (rounded - exact).abs().max(), exact.abs().max()
    assert error <= 2 * baseline + 1e-3 * largest
    assert error >= 1e-4 * largest  # it does round


def test_timesteps_may_differ_by_pose(gpu):
    config = CONFIGS["paper"]
    net = random_denoiser(config)
    packed, (sample, condition) = packed_of(layer_program(net), gpu), random_inputs(config, 6)
    timesteps = torch.tensor([3, 9, 3, 0, 9, 3])
    out = packed.denoise(sample, condition, timesteps).cpu()
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        assert torch.equal(out[one], packed.denoise(sample[one], condition[one], timestep.view(1)).cpu())


# --- The reverse process ---------------------------------------------------------------------------------------------


def table_of(sampler, steps=3, prediction_type="sample", **options):
    return step_table(NoiseSchedule(50), steps, sampler=sampler, prediction_type=prediction_type, **options)


def draw(packed, inputs, table, gpu, frame_ids=None, hypothesis_ids=None, **options):
    frame_ids = torch.arange(len(inputs)) if frame_ids is None else frame_ids
    hypothesis_ids = torch.arange(3) if hypothesis_ids is None else hypothesis_ids
    return ops.sample(
        packed, inputs.to(gpu), table, frame_ids=frame_ids.to(gpu), hypothesis_ids=hypothesis_ids.to(gpu),
        backend="cuda", **options,
    ).cpu()  # fmt: skip


def through_the_formulas(program, inputs, table, precision, **options):
    """The chain of the reference, whose network is the layer program in plain formulas."""

    class Plain(torch.nn.Module):
        def forward(self, sample, condition, timesteps):
            store = through_bfloat16 if precision == "bfloat16" else (lambda x: x)
            return run_program(program, sample, condition, timesteps, torch.float32, store, store)

    return ops.sample(Plain(), inputs, table, hypothesis_ids=torch.arange(3), backend="torch", **options)


@pytest.mark.parametrize(("precision", "mode"), RUNS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("name", ["paper", "base"])
def test_the_chain_ends_where_that_of_the_formulas_does(gpu, one_thread, name, sampler, precision, mode):
    config = CONFIGS[name]
    program = layer_program(random_denoiser(config))
    inputs = torch.randn(few(mode, 3), 17, config.num_condition_channels)
    options = {"seed": 2**63 + 5, "clip_sample_range": 1.5 if sampler != "dpm++" else None}
    table = table_of(sampler)
    if sampler == "ddpm":
        table = StepTable(table.coefficients, table.timesteps, torch.rand(3, 17, 3).double().numpy())
    out = draw(packed_of(program, gpu, precision, mode), inputs, table, gpu, **options)
    expected = through_the_formulas(program, inputs, table, precision, **options)
    # In bfloat16 an activation on the edge between two numbers may fall to either.
    assert torch.allclose(out, expected, atol=1e-4 if precision == "float32" else 3e-2)
    if precision == "bfloat16":
        assert (out - expected).square().mean().sqrt() < 4e-3


@pytest.mark.parametrize(("precision", "mode"), RUNS)
@pytest.mark.parametrize("name", ["paper", "base"])
def test_a_hypothesis_is_the_same_bits_whatever_is_beside_it(gpu, name, precision, mode):
    config = CONFIGS[name]
    packed = packed_of(layer_program(random_denoiser(config)), gpu, precision, mode)
    count, num_chains = (3, 3) if mode == "cluster" else (7, 5)
    inputs, table = torch.randn(count, 17, config.num_condition_channels), table_of("dpm++")
    frames, chains = (
        torch.tensor([5, 2**62, -1, 7, 0, 3, 9])[:count],
        torch.tensor([4, 0, 2**32 - 1, 1, 9])[:num_chains],
    )
    expected = draw(packed, inputs, table, gpu, frames, chains, seed=-3)
    assert torch.equal(draw(packed, inputs, table, gpu, frames, chains, seed=-3), expected)
    order, some = torch.randperm(count), torch.tensor([num_chains - 2, 0])
    out = draw(packed, inputs[order], table, gpu, frames[order], chains[some], seed=-3)
    assert torch.equal(out, expected[order][:, some])
    alone = draw(packed, inputs[2:3], table, gpu, frames[2:3], chains[-1:], seed=-3)
    assert torch.equal(alone, expected[2:3, -1:])


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("joints", [15, 16, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_persistent_kernels_draw_what_layers_do(gpu, name, joints, mode):
    config = replace(CONFIGS[name], skeleton=SKELETON_OF[joints])
    program = layer_program(random_denoiser(config))
    inputs, table = torch.randn(few(mode, 3), joints, config.num_condition_channels), table_of("ddim")
    expected = draw(packed_of(program, gpu, "bfloat16", "layers"), inputs, table, gpu)
    out = draw(packed_of(program, gpu, "bfloat16", mode), inputs, table, gpu)
    # An activation on the edge between two numbers may fall to either.
    assert torch.allclose(out, expected, atol=3e-2)
    assert (out - expected).square().mean().sqrt() < 4e-3


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("joints", [1, 16, 17, 18])
@pytest.mark.parametrize("width", [3, 33, 64, 129, 160])
def test_the_persistent_kernels_run_any_layers(gpu, joints, width, mode):
    """Widths of parts of a block and of several, residuals in place and elsewhere, biases by joint, FiLM, attention."""
    scaled = ScaleShift(2, 2, 0, width, normalize=False)
    normed = ScaleShift(1, 2, 1, width, normalize=True, eps=1e-5)
    layers = (
        linear(0, 1, joints, 5, width),
        graph_conv(1, 2, joints, width, width, activation="relu", residual=1),
        graph_conv(2, 1, joints, width, width, activation="gelu", residual=1),
        graph_conv(1, 2, joints, width, width, activation="relu", residual=1),
        scaled,
        linear(2, 1, joints, width, width, residual=1),
        normed,
        replace(linear(2, 3, joints, width, 96), weight=torch.randn(width, 96) * 0.3 / width**0.5),
        Attention(3, 4, 2, 16),
        linear(4, 1, joints, 32, width, residual=1),
        graph_conv(1, 5, joints, width, 3, activation="none", residual=-1),
    )
    parameters = [(1 + 0.3 * torch.randn(1, width), 0.3 * torch.randn(1, width)) for _ in range(2)]
    program = program_of(*layers, joints=joints, widths=(5, width, width, 96, 32, 3), parameters=parameters)
    inputs = torch.randn(few(mode, 3), joints, 2)
    table = StepTable(torch.tensor([[0, 1, 0, 1, 0, 0]]).double().numpy(), torch.zeros(1).long().numpy())
    out, by_layers, exact = (
        draw(packed_of(program, gpu, precision, name), inputs, table, gpu)
        for precision, name in (("bfloat16", mode), ("bfloat16", "layers"), ("float32", "layers"))
    )
    error, baseline, largest = ((x - exact).abs().max() for x in (out, by_layers, torch.zeros(())))
    assert error <= 2 * baseline + 1e-3 * largest


def test_clusters_run_layers_of_many_channels(gpu):
    """More input channels than weights are held ahead for, and output channels for more rounds than one."""
    layers = (
        linear(0, 1, 17, 5, 850),
        graph_conv(1, 2, 17, 850, 140, activation="relu"),
        linear(2, 1, 17, 140, 850),
        linear(1, 3, 17, 850, 3),
    )
    program = program_of(*layers, joints=17, widths=(5, 850, 140, 3))
    inputs = torch.randn(1, 17, 2)
    table = StepTable(torch.tensor([[0, 1, 0, 1, 0, 0]]).double().numpy(), torch.zeros(1).long().numpy())
    out, expected = (
        draw(packed_of(program, gpu, "bfloat16", mode), inputs, table, gpu, hypothesis_ids=torch.arange(1))
        for mode in ("cluster", "layers")
    )
    assert (out - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_what_hoppers_kernel_does_not_take_goes_to_the_other(gpu):
    def engines(joints, precision):
        packed = packed_of(program_of(graph_conv(0, 1, joints, 5, 3), joints=joints, widths=(5, 3)), gpu, precision)
        return packed._engine, packed._persistent_engine

    available = _backend.cuda().wgmma_available()
    for joints, precision, own in ((17, "bfloat16", available), (18, "bfloat16", False), (17, "float32", False)):
        by_layers, persistent = engines(joints, precision)
        assert (by_layers is not persistent) == own


@pytest.mark.parametrize("mode", MODES)
def test_a_term_without_a_coefficient_may_be_anything(gpu, mode):
    """A network that says NaN does no harm where q is 0; nor does an x0 of NaN where c_0 is 0."""
    program = program_of(replace(linear(0, 1, 17, 5, 3), bias=torch.full((17, 3), torch.nan)), joints=17, widths=(5, 3))
    coefficients = torch.tensor([[0.5, 0, 0.25, 0.5, 0, 0], [0, 1, 2, 0, 0, 0], [1, 0, 0, 1, 0, 0]]).double().numpy()
    table = StepTable(coefficients, torch.arange(3).numpy())
    out = draw(packed_of(program, gpu, "bfloat16", mode), torch.randn(1, 17, 2), table, gpu)
    x = ops.philox_normal(0, torch.arange(1), torch.arange(3), 0xFFFF, 51, backend="torch").view(1, 3, 17, 3)
    assert torch.allclose(out, 2 * (0.25 * x + 0.5 * 0.5 * x))


@pytest.mark.parametrize("mode", MODES)
def test_a_frame_that_is_no_number_leaves_the_others_alone(gpu, mode):
    config = CONFIGS["base"]
    packed = packed_of(layer_program(random_denoiser(config)), gpu, "bfloat16", mode)
    # One after the other where they share memory: eight of a tile, or with three emulated clusters frames 1 and 4.
    inputs, table = torch.randn(5, 17, config.num_condition_channels), table_of("ddim")
    chains = torch.arange(few(mode, 3))
    expected = draw(packed, inputs, table, gpu, hypothesis_ids=chains)
    inputs[1] = torch.nan
    out = draw(packed, inputs, table, gpu, hypothesis_ids=chains)
    assert torch.equal(out[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert bool(out[1].isnan().all())
    inputs[1] = 0.0
    assert bool(draw(packed, inputs, table, gpu, hypothesis_ids=chains).isfinite().all())


@pytest.mark.parametrize(("frames", "chains"), [(0, 3), (2, 0)])
def test_nothing_to_draw(gpu, frames, chains):
    config = CONFIGS["paper"]
    packed = packed_of(layer_program(random_denoiser(config)), gpu)
    inputs = torch.randn(frames, 17, config.num_condition_channels)
    out = draw(packed, inputs, table_of("ddim"), gpu, hypothesis_ids=torch.arange(chains))
    assert out.shape == (frames, chains, 17, 3)


def test_tables_of_steps_are_kept(gpu, monkeypatch):
    """The last ones, and those that a graph of the caller's may read."""
    program, timesteps = layer_program(random_denoiser(CONFIGS["paper"])), []
    tabulate = program.tabulate
    packed = packed_of(replace(program, tabulate=lambda t: (timesteps.append(t), tabulate(t))[1]), gpu)
    inputs = torch.randn(1, 17, 2)

    def called(steps):
        before = len(timesteps)
        out = draw(packed, inputs, step_table(NoiseSchedule(100), steps, sampler="ddim"), gpu)
        return out, len(timesteps) > before

    first, new = called(1)
    assert new
    again, new = called(1)
    assert not new
    assert torch.equal(first, again)
    next(iter(packed._steps.values())).captured = True
    assert all(called(steps)[1] for steps in range(2, 11))  # nine more
    assert not called(1)[1]
    assert not called(3)[1]
    assert called(2)[1]
    with pytest.raises(RuntimeError, match="a step table must be used once before a CUDA graph captures it"):
        packed._steps_of(table_of("ddpm"), capturing=True)


@requires_cuda
@pytest.mark.parametrize(("precision", "mode"), RUNS)
def test_sampler_in_a_graph_of_the_caller(precision, mode):
    config = CONFIGS["paper"]
    packed = packed_of(layer_program(random_denoiser(config)), torch.device("cuda"), precision, mode)
    inputs, table = torch.randn(2, 17, config.num_condition_channels, device="cuda"), table_of("ddpm")
    ids = torch.arange(2, device="cuda"), torch.arange(5, device="cuda")
    given = {"frame_ids": ids[0], "hypothesis_ids": ids[1], "seed": 3}
    expected = ops.sample(packed, inputs, table, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sample(packed, inputs, table, **given)
    graph.replay()
    assert torch.equal(out, expected)
    inputs.add_(0.5)
    graph.replay()
    assert torch.equal(out, ops.sample(packed, inputs, table, **given))


def test_the_mode_is_chosen_by_the_number_of_hypotheses(gpu):
    program = layer_program(random_denoiser(CONFIGS["paper"]))
    packed = packed_of(program, gpu, "bfloat16")
    has_clusters = gpu.type == "cpu" or torch.cuda.get_device_capability(gpu) >= (9, 0)
    assert packed.for_hypotheses(3).mode == ("cluster" if has_clusters else "layers")  # emulated there are three
    assert packed.for_hypotheses(100).mode == "layers"
    assert packed.for_hypotheses(100000).mode == "persistent"
    for count in (3, 100000):
        assert packed_of(program, gpu, "bfloat16", "layers").for_hypotheses(count).mode == "layers"
        assert packed_of(program, gpu, "float32").for_hypotheses(count).mode == "layers"
    assert packed_of(program, gpu, "float32").for_hypotheses(0).mode == "layers"
    with pytest.raises(ValueError, match="mode cannot be persistent here: it takes bfloat16 only"):
        packed_of(program, gpu, "float32", "persistent")
    with pytest.raises(ValueError, match="mode cannot be cluster here: it takes bfloat16 only"):
        packed_of(program, gpu, "float32", "cluster")
    with pytest.raises(ValueError, match="mode must be one of layers, persistent, cluster or None, got 'graph'"):
        packed_of(program, gpu, "bfloat16", "graph")


# --- Packing ---------------------------------------------------------------------------------------------------------

SHARED_BYTES = 227 << 10  # that a block of sm_90 may have


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (denoiser_config("paper", hidden_dim=384, num_layers=4), True),
        (denoiser_config("paper", hidden_dim=384, num_layers=4, skeleton="h36m_16"), True),
        (denoiser_config("base", hidden_dim=128, num_layers=4), True),
        (denoiser_config("base", hidden_dim=384, num_layers=4), False),
    ],
)
def test_what_fits_into_the_memory_of_a_multiprocessor(gpu, config, fits):
    packed = packed_of(layer_program(random_denoiser(config)), gpu, "bfloat16")
    assert (packed.tile_bytes <= SHARED_BYTES) == fits
    if not fits and gpu.type == "cpu":
        assert packed.for_hypotheses(100000).mode == "layers"
        with pytest.raises(ValueError, match="mode cannot be persistent here: a tile takes"):
            packed_of(packed.program, gpu, "bfloat16", "persistent")


def test_what_fits_into_the_memory_of_a_cluster(gpu):
    """A pose instead of eight: four times the width."""
    program = layer_program(random_denoiser(denoiser_config("base", hidden_dim=512, num_layers=1)))
    assert packed_of(program, gpu, "bfloat16", "cluster").for_hypotheses(3).mode == "cluster"
    wide = program_of(linear(0, 1, 17, 5, 4096), linear(1, 2, 17, 4096, 3), joints=17, widths=(5, 4096, 3))
    with pytest.raises(ValueError, match="mode cannot be cluster here: the GPU has no clusters of blocks with"):
        packed_of(wide, gpu, "bfloat16", "cluster")


def test_what_lives_at_the_same_time_does_not_overlap(gpu, monkeypatch):
    """Whatever a layer reads is where it was written: every byte belongs to one value from its writing to its end."""
    from diffupose.engines import cuda_plan as cuda_program

    placed = []
    place = cuda_program._place

    def remember(values):
        result = place(values)
        placed.extend(values)
        return result

    monkeypatch.setattr(cuda_program, "_place", remember)
    for config, layout in itertools.product(CONFIGS.values(), get_args(Layout)):
        placed.clear()
        program, cpu = layer_program(random_denoiser(config)), torch.device("cpu")
        packed = pack_program(program, True, cpu, _backend.cuda(), layout)
        assert len(placed) > 4
        for index, one in enumerate(placed):
            assert 0 <= one.offset <= packed.tile_bytes - one.size
            for other in placed[:index]:
                if one.first <= other.last and other.first <= one.last:
                    assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset


def test_programs_that_the_engine_cannot_run(gpu):
    heads = program_of(
        linear(0, 1, 17, 5, 72), Attention(1, 2, 3, 8), linear(2, 3, 17, 24, 3), joints=17, widths=(5, 72, 24, 3)
    )
    alone = program_of(linear(0, 1, 17, 5, 48), graph_conv(1, 2, 17, 48, 48), Attention(2, 3, 1, 16),
                       joints=17, widths=(5, 48, 48, 16))  # fmt: skip
    many = program_of(graph_conv(0, 1, 19, 5, 3), joints=19, widths=(5, 3))
    scaled = program_of(linear(0, 1, 17, 5, 3), ScaleShift(1, 1, 0, 3, normalize=False), joints=17, widths=(5, 3))
    itself = program_of(linear(0, 1, 17, 5, 16), linear(1, 1, 17, 16, 16, residual=1), linear(1, 2, 17, 16, 3),
                        joints=17, widths=(5, 16, 3))  # fmt: skip
    again = program_of(linear(0, 1, 17, 5, 48), Attention(1, 2, 1, 16), linear(1, 3, 17, 48, 3),
                       joints=17, widths=(5, 48, 16, 3))  # fmt: skip
    for program, message in (
        (heads, "heads of a multiple of 16 channels, got 8"),
        (alone, "attention behind the linear layer of its queries, keys and values only"),
        (many, "takes 18 joints at most, got 19"),
        (scaled, "a last buffer that a product writes and nothing reads"),
        (itself, "products that do not overwrite their input"),
        (again, "queries, keys and values that attention alone reads"),
    ):
        assert message in unfit(program, 18)
        with pytest.raises(ValueError, match=message):
            packed_of(program, gpu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(1)}, r"bias must have shape \[33\], got \(1,\)"),
        ({"own": torch.zeros(5, 33)}, r"own must have shape \[17, 33\], got \(5, 33\)"),
        ({"adjacency": torch.zeros(3, 3)}, r"adjacency must have shape \[17, 17\], got \(3, 3\)"),
    ],
)
def test_layers_that_do_not_fit(gpu, change, message):
    layer = replace(graph_conv(0, 1, 17, 5, 33), **change)
    with pytest.raises(ValueError, match=message):
        packed_of(program_of(layer, joints=17, widths=(5, 33)), gpu)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([linear(0, 1, 17, 6, 3)], "input of layer 0 must be 6 wide, buffer 0 is 5 wide"),
        ([linear(0, 1, 17, 5, 4)], "output of layer 0 must be 4 wide, buffer 1 is 3 wide"),
        ([linear(0, 2, 17, 5, 3)], r"output of layer 0 must lie in \[0, 2\), got 2"),
        ([linear(0, 1, 17, 5, 3, residual=0)], "residual of layer 0 must be 3 wide, buffer 0 is 5 wide"),
        ([linear(0, 1, 17, 5, 3, residual=1)], "residual of layer 0 must be written before it, buffer 1 is not"),
        ([ScaleShift(0, 0, 0, 5, normalize=False)], "a layer must write the last buffer, 1"),
    ],
)
def test_buffers_that_do_not_fit(gpu, layers, message):
    with pytest.raises(ValueError, match=message):
        packed_of(program_of(*layers, joints=17, widths=(5, 3)), gpu)


def test_sizes_and_offsets_out_of_bounds(gpu):
    """The binding by itself: an address is never computed from what overflows."""
    extension = _backend.cuda()
    layer = {"kind": "scale_shift", "input_steps": 1, "output_steps": 1, "input": 0, "output": 0}
    record = extension.layer_record(**layer)
    for wrong in ({"input": -128}, {"output": -1}, {"residual": -2}, {"kind": "attention_weights"}):
        with pytest.raises(ValueError, match="offsets must not be negative"):
            extension.layer_record(**(layer | wrong))
    engine = {"layers": record, "layers_cuda": 1, "num_joints": 17, "num_condition_channels": 2,
              "num_output_channels": 3, "input": 0, "output": 0, "tile_bytes": 128, "bfloat16": False}  # fmt: skip
    with pytest.raises(ValueError, match="input and output must lie within tile_bytes"):
        extension.CudaEngine(**(engine | {"output": 128}))
    for wrong in ({"bfloat16": False}, {"num_joints": 18}):
        with pytest.raises(ValueError, match="wgmma takes bfloat16 and 17 joints at most"):
            extension.CudaEngine(**(engine | {"bfloat16": True, "layout": "wgmma"} | wrong))
    with pytest.raises(ValueError, match="tile_bytes must hold what wgmma stages"):
        extension.CudaEngine(**(engine | {"bfloat16": True, "layout": "wgmma"}))
    with pytest.raises(ValueError, match="clusters take bfloat16 only"):
        extension.CudaEngine(**(engine | {"layout": "cluster"}))
    with pytest.raises(ValueError, match="tile_bytes of a cluster must be a multiple of 16"):
        extension.CudaEngine(**(engine | {"bfloat16": True, "layout": "cluster", "tile_bytes": 136}))
    with pytest.raises(ValueError, match="layout must be pairs, wgmma or cluster"):
        extension.CudaEngine(**(engine | {"layout": "rows"}))
    others = [
        extension.CudaEngine(**(engine | {"bfloat16": True, "layout": layout, "tile_bytes": 8192}))
        for layout in ("wgmma", "cluster")
    ]
    for other in others:
        with pytest.raises(ValueError, match="a program for wgmma or clusters only samples"):
            other.denoise(sample=1, condition=1, parameters=1, num_poses=1, workspace=1, out=1, stream=0)
    names = ("condition", "coefficients", "noise_scale", "parameters", "seed", "frame_ids", "hypothesis_ids",
             "x0_last", "out", "workspace")  # fmt: skip
    rest = {"num_parameters": 0, "clip": None, "num_steps": 1, "num_blocks": 0, "stream": 0}
    for other in others:
        with pytest.raises(ValueError, match="a program for wgmma or clusters is sampled by one kernel"):
            other.sample(**dict.fromkeys(names, 1), **rest, num_frames=1, num_hypotheses=1)
    for wrong, message in (({"num_blocks": -1}, "num_blocks must not be negative"),
                           ({"clip": float("nan")}, "clip must be a number")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            extension.CudaEngine(**engine).sample(
                **dict.fromkeys(names, 1), **(rest | wrong), num_frames=1, num_hypotheses=1
            )
    for frames, hypotheses in ((2**62, 4), (2**32, 2**32)):
        with pytest.raises(ValueError, match=r"sizes must make at most 2\^41 numbers"):
            extension.CudaEngine(**engine).sample(
                **dict.fromkeys(names, 1), **rest, num_frames=frames, num_hypotheses=hypotheses
            )


def test_ids_on_another_device_are_refused(gpu):
    config = CONFIGS["paper"]
    packed = packed_of(layer_program(random_denoiser(config)), gpu)
    inputs = torch.randn(2, 17, config.num_condition_channels, device=gpu)
    with pytest.raises(ValueError, match="frame_ids must be on the device of inputs"):
        ops.sample(packed, inputs, table_of("ddim"), frame_ids=torch.arange(2, device="meta"), num_hypotheses=1)


# --- The lifter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "person"])
def test_a_lift_gives_the_same_poses_as_with_pytorch(gpu, tmp_path, kind):
    lifter = tiny_lifter(tmp_path, kind)
    if gpu.type == "cuda":
        lifter = type(lifter).from_pretrained(tmp_path / f"{kind}.safetensors", device=gpu)
    if kind == "person":  # its heads have eight channels
        with pytest.raises(BackendUnavailableError, match=r'"cuda" is not available: .*heads of a multiple of 16'):
            lifter(people(1), image_size=(1000, 800), backend="cuda")
        lifter.denoiser = random_denoiser(CONFIGS["base"]).to(gpu)
    keypoints = people(3)
    options = {"image_size": (1000, 800), "num_hypotheses": 4, "seed": 3}
    expected = lifter(keypoints, backend="torch", **options).hypotheses.cpu()
    result = lifter(keypoints, backend="cuda", **options)
    assert torch.allclose(result.hypotheses.cpu(), expected, atol=1e-4)
    assert result.meta["engine"] == "cuda layers"
    half = lifter(keypoints, backend="cuda", precision="bfloat16", **options)
    assert half.meta["precision"] == "bfloat16"
    assert torch.allclose(half.hypotheses.cpu(), expected, atol=0.1)
    assert not torch.equal(half.hypotheses.cpu(), expected)
