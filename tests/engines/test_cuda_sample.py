"""Sampling with the CUDA engine: on a GPU where there is one, else emulated on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cuda_engines import CONFIGS, MODES, RUNS, draw, few, packed_of, table_of
from support.plain_program import run_program, through_bfloat16
from support.random_denoisers import SKELETON_OF, random_denoiser
from support.random_layers import graph_conv, linear, program_of
from support.sweeps import mostly_slow, sweep

from diffupose import ops
from diffupose.engines.cuda_runs import StepsOnDevice, StepTables
from diffupose.engines.layer_program import Attention, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.ops import _backend
from diffupose.schedule import NoiseSchedule, StepTable, step_table
from diffupose.testing import requires_cuda


def through_the_formulas(program, inputs, table, precision, **options):
    """The chain of the reference, whose network is the layer program in plain formulas."""

    class Plain(torch.nn.Module):
        def forward(self, sample, condition, timesteps):
            store = through_bfloat16 if precision == "bfloat16" else (lambda x: x)
            return run_program(program, sample, condition, timesteps, torch.float32, store, store)

    return ops.sample(Plain(), inputs, table, hypothesis_ids=torch.arange(3), backend="torch", **options)


@sweep(quick=5, run=RUNS, sampler=["ddpm", "ddim", "dpm++"], name=["paper", "base"])
def test_the_chain_ends_where_that_of_the_formulas_does(gpu, one_thread, name, sampler, run):
    # Not by the test's name: some random networks amplify the rounding of bfloat16 beyond the bounds below.
    torch.manual_seed(1)
    precision, mode = run
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


@sweep(quick=2, run=RUNS[::-1], name=["paper", "base"])
def test_a_hypothesis_is_the_same_bits_whatever_is_beside_it(gpu, name, run):
    precision, mode = run
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


@sweep(quick=6, name=CONFIGS, mode=MODES[1:], joints=[17, 16, 15])
def test_the_persistent_kernels_draw_what_layers_do(gpu, name, joints, mode):
    config = replace(CONFIGS[name], skeleton=SKELETON_OF[joints])
    program = layer_program(random_denoiser(config))
    inputs, table = torch.randn(few(mode, 3), joints, config.num_condition_channels), table_of("ddim")
    expected = draw(packed_of(program, gpu, "bfloat16", "layers"), inputs, table, gpu)
    out = draw(packed_of(program, gpu, "bfloat16", mode), inputs, table, gpu)
    # An activation on the edge between two numbers may fall to either.
    assert torch.allclose(out, expected, atol=3e-2)
    assert (out - expected).square().mean().sqrt() < 4e-3


@sweep(quick=5, width=[3, 33, 64, 129, 160], mode=MODES[1:], joints=[17, 16, 1, 18])
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


@pytest.mark.slow
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
    """What runs on both has weights in two layouts, and takes more memory than the program by layers."""
    available = _backend.cuda().wgmma_available()
    for joints, own in ((17, available), (18, False)):
        program = program_of(graph_conv(0, 1, joints, 5, 3), joints=joints, widths=(5, 3))
        by_layers, persistent = (
            packed_of(program, gpu, "bfloat16", mode).weight_bytes for mode in ("layers", "persistent")
        )
        assert (persistent > by_layers) == own


@pytest.mark.parametrize("mode", MODES)
def test_a_term_without_a_coefficient_may_be_anything(gpu, mode):
    """A network that says NaN does no harm where q is 0; nor does an x0 of NaN where c_0 is 0."""
    program = program_of(replace(linear(0, 1, 17, 5, 3), bias=torch.full((17, 3), torch.nan)), joints=17, widths=(5, 3))
    coefficients = torch.tensor([[0.5, 0, 0.25, 0.5, 0, 0], [0, 1, 2, 0, 0, 0], [1, 0, 0, 1, 0, 0]]).double().numpy()
    table = StepTable(coefficients, torch.arange(3).numpy())
    out = draw(packed_of(program, gpu, "bfloat16", mode), torch.randn(1, 17, 2), table, gpu)
    x = ops.philox_normal(0, torch.arange(1), torch.arange(3), 0xFFFF, 51, backend="torch").view(1, 3, 17, 3)
    assert torch.allclose(out, 2 * (0.25 * x + 0.5 * 0.5 * x))


@pytest.mark.parametrize("mode", mostly_slow(MODES, 2))
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


def test_tables_of_steps_are_kept(gpu):
    """The last eight."""
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
    assert all(called(steps)[1] for steps in range(2, 9))  # seven more
    assert not called(1)[1]
    assert called(9)[1]
    assert not called(1)[1] and called(2)[1]


def test_a_table_that_a_graph_reads_is_kept():
    """For good: nobody knows how long the caller replays the graph. A new table cannot be brought meanwhile."""
    tables, made = StepTables(), []

    def get(steps, capturing=False):
        def bring(table):
            made.append(steps)
            return StepsOnDevice(table, torch.zeros(steps, 4), lambda tensor: tensor)

        return tables.get(step_table(NoiseSchedule(100), steps, sampler="ddim"), capturing, bring)

    first = get(1)
    assert get(1, capturing=True) == first
    for steps in range(2, 11):
        get(steps)
    assert made == list(range(1, 11))
    assert get(1) == first and len(made) == 10
    get(2)
    assert made[10:] == [2]
    with pytest.raises(RuntimeError, match="a step table must be used once before a CUDA graph captures it"):
        get(99, capturing=True)


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
