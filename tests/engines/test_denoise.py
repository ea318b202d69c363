"""The packed denoiser: layers against plain formulas, networks against their modules, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.plain_program import run_program, through_bfloat16
from support.random_denoisers import SKELETON_OF, denoiser_config, in_float64, random_denoiser, random_inputs
from support.random_layers import graph_conv, linear, program_of
from support.sweeps import sweep

from diffupose.engines.layer_program import Attention, LayerProgram, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.ops import PackedDenoiser, _backend
from diffupose.testing import assert_parity, requires_cpp

STEP = torch.tensor([7])

# --- Layers ---------------------------------------------------------------------------------------------------------


def inputs_of(program, count):
    joints, channels = program.num_joints, program.widths[0] - 3
    return torch.randn(count, joints, 3), torch.randn(count, joints, channels)


def assert_runs_like_its_formula(program, count=5, precision="float32"):
    packed, inputs = PackedDenoiser(program, precision), inputs_of(program, count)
    if precision == "float32":

        def plain(sample, condition):
            return run_program(program, sample, condition, STEP, sample.dtype)

        assert_parity(lambda *arguments: packed.denoise(*arguments, STEP), plain, inputs)
        return
    exact = run_program(program, *inputs, STEP, rounding=through_bfloat16)
    error = (packed.denoise(*inputs, STEP) - exact).abs().max()
    assert error <= 1e-3 * exact.abs().max()  # NaN fails


@requires_cpp
@sweep(
    sizes=[(1, 3, 3), (17, 1, 5), (17, 5, 1), (15, 3, 33), (16, 129, 16), (17, 129, 384), (17, 384, 129), (64, 33, 31)],
    activation=["none", "relu", "gelu"],
    precision=["float32", "bfloat16"],
)
def test_graph_convolution(isa, sizes, activation, precision):
    joints, c_in, c_out = sizes
    layers, widths = [graph_conv(0, 1, joints, c_in, c_out, activation=activation)], (c_in, c_out)
    if c_in < 3:  # an input has three channels at least, as has an output: other layers make and spread narrow ones
        layers, widths = [linear(0, 1, joints, 3, c_in), replace(layers[0], input=1, output=2)], (3, *widths)
    if c_out < 3:
        layers, widths = [*layers, linear(len(layers), len(layers) + 1, joints, c_out, 3)], (*widths, 3)
    program = program_of(*layers, joints=joints, widths=widths)
    assert_runs_like_its_formula(program, precision=precision)


@requires_cpp
@sweep(
    sizes=[(1, 3, 3), (16, 1, 129), (17, 129, 384), (17, 384, 3), (64, 7, 33)],
    precision=["float32", "bfloat16"],
    per_joint=[False, True],
)
def test_linear_layer(isa, sizes, per_joint, precision):
    joints, c_in, c_out = sizes
    layer = linear(0, 1, joints, c_in, c_out)
    layer = layer if per_joint else replace(layer, bias=layer.bias[0])
    program = program_of(layer, joints=joints, widths=(c_in, c_out))
    if c_in < 3:  # an input has three channels at least
        layers = linear(0, 1, joints, 3, c_in), replace(layer, input=1, output=2)
        program = program_of(*layers, joints=joints, widths=(3, c_in, c_out))
    assert_runs_like_its_formula(program, precision=precision)


@requires_cpp
@pytest.mark.parametrize("joints", [1, 16, 17])
@pytest.mark.parametrize("width", [3, 33, 129])
def test_a_residual_may_be_the_output_itself_or_another_buffer(isa, joints, width):
    layers = (
        linear(0, 1, joints, 4, width),
        graph_conv(1, 2, joints, width, width, activation="relu", residual=1),
        graph_conv(2, 1, joints, width, width, activation="gelu", residual=1),
        linear(2, 1, joints, width, width, residual=1),
        linear(1, 3, joints, width, width, residual=2),
    )
    assert_runs_like_its_formula(program_of(*layers, joints=joints, widths=(4, width, width, width)))


@requires_cpp
@pytest.mark.parametrize("joints", [1, 15, 16, 17, 64])
@pytest.mark.parametrize(("num_heads", "channels"), [(1, 1), (5, 1), (3, 3), (4, 6), (2, 33), (1, 192)])
def test_attention_for_any_number_of_joints_and_width_of_a_head(isa, joints, num_heads, channels):
    width = num_heads * channels
    layers = (
        replace(linear(0, 1, joints, 5, 3 * width), weight=torch.randn(5, 3 * width) * 0.3),
        Attention(1, 2, num_heads, channels),
    )
    # As in the released network, what it writes lies right behind the queries, keys and values.
    program = program_of(*layers, linear(2, 3, joints, width, 3), joints=joints, widths=(5, 3 * width, width, 3))
    assert_runs_like_its_formula(program, count=3)


@requires_cpp
@sweep(channels=[1, 3, 16, 33, 129, 384], normalize=[False, True], in_place=[False, True])
def test_scale_and_shift(isa, channels, normalize, in_place):
    layers = (
        linear(0, 1, 17, 5, channels),
        ScaleShift(1, 1 if in_place else 2, 0, channels, normalize, eps=1e-5),
        linear(1 if in_place else 2, 3, 17, channels, 3),
    )
    # An offset that is large against the spread: a variance from E[x^2] - E[x]^2 would lose its digits.
    layers = (replace(layers[0], bias=layers[0].bias + 30), *layers[1:])
    parameters = [(1 + torch.randn(1, channels), torch.randn(1, channels))]
    program = program_of(*layers, joints=17, widths=(5, channels, channels, 3), parameters=parameters)
    assert_runs_like_its_formula(program)


@requires_cpp
def test_parameters_are_those_of_the_timestep(isa):
    widths, joints = (5, 5), 4
    table = torch.randn(10, 2, 5)
    program = LayerProgram(
        joints, widths, (ScaleShift(0, 1, 0, 5, False),), lambda timesteps: [table[timesteps].unbind(1)]
    )
    packed, (sample, condition) = PackedDenoiser(program), inputs_of(program, 6)
    timesteps = torch.tensor([3, 9, 3, 0, 9, 3])
    out = packed.denoise(sample, condition, timesteps)
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        assert torch.equal(out[one], packed.denoise(sample[one], condition[one], timestep.view(1)))
        exact = run_program(program, sample[one], condition[one], timestep.view(1))
        assert torch.allclose(out[one].double(), exact, atol=1e-6)


@requires_cpp
def test_timesteps_of_another_integer_type_are_not_taken_for_others():
    """The table of one int64 is as many bytes as that of two int32."""
    table = torch.randn(10, 2, 3)
    program = LayerProgram(1, (3, 3), (ScaleShift(0, 1, 0, 3, False),), lambda t: [table[t].unbind(1)])
    packed = PackedDenoiser(program)
    assert packed.parameters(torch.tensor([5])).shape[0] == 1
    both = packed.parameters(torch.tensor([5, 0], dtype=torch.int32))
    assert torch.equal(both, packed.parameters(torch.tensor([5, 0])))


# --- Networks -------------------------------------------------------------------------------------------------------

NETWORKS = {
    "paper-32": denoiser_config("paper", hidden_dim=32),
    "paper-96": denoiser_config("paper", hidden_dim=96, condition_channels=3, adjacency_mask=True),
    "paper-between": denoiser_config("paper", time_blocks="between", num_layers=3, adjacency_normalization="symmetric"),
    "base-24": denoiser_config("base", hidden_dim=24, num_heads=4, camera_cue=True),
    "base-34": denoiser_config("base", hidden_dim=34, num_heads=1, adjacency_mask=True),
    "base-without-attention": denoiser_config("base", hidden_dim=36, num_heads=0),
    "base-66": denoiser_config("base", hidden_dim=66, num_heads=3),
}


def with_joints(config, joints):
    return replace(config, skeleton=SKELETON_OF[joints])


def assert_network_parity(config, count):
    net = random_denoiser(config)
    exact_net, packed = in_float64(net), PackedDenoiser(layer_program(net))
    assert_parity(
        lambda sample, condition: packed.denoise(sample, condition, STEP),
        lambda sample, condition: net(sample, condition, STEP),
        random_inputs(config, count),
        exact=lambda sample, condition: exact_net(sample, condition, STEP),
    )


@requires_cpp
@pytest.mark.parametrize("joints", [15, 16, 17])
@pytest.mark.parametrize("name", NETWORKS)
def test_parity_with_the_module(isa, name, joints):
    assert_network_parity(with_joints(NETWORKS[name], joints), 5)


@requires_cpp
@pytest.mark.parametrize("count", [0, 1, 3, 33])
@pytest.mark.parametrize("name", ["paper-32", "base-24"])
def test_parity_for_any_number_of_poses(isa, name, count):
    assert_network_parity(NETWORKS[name], count)


@requires_cpp
@pytest.mark.parametrize(
    "config",
    [
        denoiser_config("paper", hidden_dim=384, num_layers=4),
        denoiser_config("base", hidden_dim=128, num_layers=4),
        denoiser_config("base", hidden_dim=384, num_layers=1),
    ],
    ids=["paper-384", "base-128", "base-384"],
)
def test_parity_in_full_size(isa, config):
    assert_network_parity(config, 3)


@requires_cpp
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_as_near_as_the_formulas_with_rounded_operands(isa, name):
    """The module cannot be the baseline: under autocast it keeps results in bfloat16, too. The plain formulas can.

    Bit by bit they differ from the engine: an activation on the edge between two bfloat16 numbers may fall to either.
    """
    config = NETWORKS[name]
    net = random_denoiser(config)
    program, inputs = layer_program(net), random_inputs(config, 5)
    exact = in_float64(net)(inputs[0].double(), inputs[1].double(), STEP)
    rounded = run_program(program, *inputs, STEP, torch.float32, through_bfloat16)
    error = (PackedDenoiser(program, "bfloat16").denoise(*inputs, STEP) - exact).abs().max()
    baseline, largest = (rounded - exact).abs().max(), exact.abs().max()
    assert error <= 2 * baseline + 1e-3 * largest
    assert error >= 1e-4 * largest  # it does round


@requires_cpp
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["paper-32", "base-24"])
def test_a_pose_is_the_same_bits_in_every_batch_and_on_every_number_of_threads(isa, name, precision, restore_threads):
    config = NETWORKS[name]
    packed = PackedDenoiser(layer_program(random_denoiser(config)), precision)
    sample, condition = random_inputs(config, 70)
    torch.set_num_threads(1)
    expected = packed.denoise(sample, condition, STEP)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 70), slice(3, 4), slice(10, 12), slice(20, 24), slice(7, 38), slice(69, 70)):
            assert torch.equal(packed.denoise(sample[rows], condition[rows], STEP), expected[rows]), (threads, rows)
        order = torch.randperm(70)
        assert torch.equal(packed.denoise(sample[order], condition[order], STEP), expected[order])


@requires_cpp
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["paper-32", "base-24"])
def test_a_pose_that_is_no_number_leaves_the_others_alone(isa, name, precision, value):
    config = NETWORKS[name]
    packed = PackedDenoiser(layer_program(random_denoiser(config)), precision)
    sample, condition = random_inputs(config, 33)
    expected = packed.denoise(sample, condition, STEP)
    sample[[4, 20]] = value
    out = packed.denoise(sample, condition, STEP)
    touched = torch.zeros(33, dtype=torch.bool)
    touched[[4, 20]] = True
    assert torch.equal(out[~touched], expected[~touched])
    assert not bool(out[touched].isfinite().any())
    sample[[4, 20]] = 1.0
    assert bool(packed.denoise(sample, condition, STEP).isfinite().all())


@requires_cpp
def test_inputs_of_other_layout_and_type():
    config = NETWORKS["base-24"]
    packed = PackedDenoiser(layer_program(random_denoiser(config)))
    sample, condition = random_inputs(config, 6)
    expected = packed.denoise(sample, condition, STEP)
    strided = torch.stack((sample, sample), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(packed.denoise(strided, condition, STEP), expected)
    one = packed.denoise(sample, condition[:1].expand(6, -1, -1), STEP)
    assert torch.equal(one, packed.denoise(sample, condition[:1].repeat(6, 1, 1), STEP))
    assert torch.equal(packed.denoise(sample.double(), condition.double(), STEP), expected)
    assert torch.equal(packed.denoise(sample.requires_grad_(), condition, STEP), expected)


# --- Errors ---------------------------------------------------------------------------------------------------------


@requires_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 17)}, r"sample must have shape \[N, 17, 3\], got \(2, 17\)"),
        ({"sample": torch.zeros(2, 16, 3)}, r"sample must have shape \[N, 17, 3\], got \(2, 16, 3\)"),
        ({"sample": torch.zeros(2, 17, 4)}, "sample must have shape"),
        ({"condition": torch.zeros(1, 17, 2)}, r"condition must have shape \[2, 17, 2\], got \(1, 17, 2\)"),
        ({"condition": torch.zeros(2, 17, 3)}, "condition must have shape"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, r"timesteps must have shape \[1\] or \[2\], got \(3,\)"),
        ({"timesteps": torch.zeros((), dtype=torch.int64)}, "timesteps must have shape"),
        ({"timesteps": torch.zeros(1)}, "timesteps must be integers, got torch.float32"),
        ({"timesteps": torch.zeros(1, dtype=torch.bool)}, "timesteps must be integers, got torch.bool"),
    ],
)
def test_errors_name_the_argument(change, message):
    packed = PackedDenoiser(layer_program(random_denoiser(denoiser_config("paper", hidden_dim=32, num_layers=1))))
    arguments = {"sample": torch.zeros(2, 17, 3), "condition": torch.zeros(2, 17, 2), "timesteps": STEP} | change
    with pytest.raises(ValueError, match=message):
        packed.denoise(**arguments)


GOOD = graph_conv(0, 1, 4, 5, 6)


def unchecked(*layers, joints=4, widths=(5, 6)):
    """A program that does not check itself, to see that the extension does: it reads where it is told to."""
    return SimpleNamespace(num_joints=joints, widths=widths, layers=layers)


@requires_cpp
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (replace(GOOD, input=2), "input is not a buffer"),
        (replace(GOOD, input=-1), "input is not a buffer"),
        (replace(GOOD, output=7), "output is not a buffer"),
        (replace(GOOD, residual=2), "residual is not a buffer"),
        (replace(GOOD, residual=0), "residual is too narrow for its layer"),
        (graph_conv(0, 1, 4, 6, 6), "input is too narrow for its layer"),
        (graph_conv(0, 1, 4, 5, 7), "output is too narrow for its layer"),
        (graph_conv(0, 0, 4, 5, 5), "a graph convolution cannot overwrite its input"),
        (linear(1, 1, 4, 5, 5), "a linear layer cannot overwrite its input"),
        (linear(0, 1, 4, 6, 6), "input is too narrow"),
        (Attention(0, 1, 2, 1), "input is too narrow"),
        (Attention(1, 0, 1, 6), "input is too narrow"),
        (Attention(0, 0, 1, 1), "attention cannot overwrite its input"),
        (Attention(0, 1, 0, 1), "attention needs a head and a channel at least"),
        (ScaleShift(0, 1, 0, 6, False), "input is too narrow"),
        (ScaleShift(0, 1, 0, 0, False), "input is too narrow|channels"),
        (replace(GOOD, activation="tanh"), "activation must be none, relu or gelu"),
    ],
)
def test_layers_that_the_extension_refuses(layer, message):
    with pytest.raises(ValueError, match=message):
        PackedDenoiser(unchecked(layer))


@requires_cpp
@pytest.mark.parametrize(
    ("joints", "widths", "message"),
    [
        (0, (5, 6), r"num_joints must lie in \[1, 64\], got 0"),
        (65, (5, 6), r"num_joints must lie in \[1, 64\], got 65"),
        (4, (5,), "widths must hold an input and an output at least"),
        (4, (2, 6), "the input must be at least 3 wide"),
        (4, (5, 2), "the output must be at least 3 wide"),
        (4, (5, 0, 6), "every width must be at least 1"),
    ],
)
def test_buffers_that_the_extension_refuses(joints, widths, message):
    with pytest.raises(ValueError, match=message):
        PackedDenoiser(unchecked(joints=joints, widths=widths))


@requires_cpp
def test_a_table_of_parameters_must_fit_its_layers():
    layer = ScaleShift(0, 1, 0, 5, False)
    sample, condition = torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)
    for parameters, message in (
        ([], "1 pairs"),
        ([(torch.zeros(1, 5), torch.zeros(1, 5))] * 2, "1 pairs"),
        ([(torch.zeros(1, 4), torch.zeros(1, 4))], r"shape \[1, 5\]"),
        ([(torch.zeros(2, 5), torch.zeros(2, 5))], r"shape \[1, 5\]"),
    ):
        packed = PackedDenoiser(program_of(layer, joints=4, widths=(5, 5), parameters=parameters))
        with pytest.raises(ValueError, match=message):
            packed.denoise(sample, condition, STEP)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'int8'"):
        PackedDenoiser(program_of(GOOD, joints=4, widths=(5, 6)), "int8")


@requires_cpp
def test_an_unknown_instruction_set_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("DIFFUPOSE_ISA", "mmx")
    with pytest.raises(
        ValueError, match=r"the environment variable DIFFUPOSE_ISA must be one of .*portable.*; got 'mmx'"
    ):
        PackedDenoiser(program_of(GOOD, joints=4, widths=(5, 6)))
    monkeypatch.setenv("DIFFUPOSE_ISA", "")
    assert PackedDenoiser(program_of(GOOD, joints=4, widths=(5, 6))).isa == _backend.cpp().usable_isas()[-1]


@requires_cpp
def test_the_instruction_set_is_the_one_that_was_asked_for(isa):
    assert _backend.cpp().active_isa() == PackedDenoiser(program_of(GOOD, joints=4, widths=(5, 6))).isa == isa


@requires_cpp
def test_null_pointers_are_refused():
    engine = _backend.cpp().Engine(4, [5, 6], False)
    buffers = {"input": 0, "output": 1}
    graph = {"residual": -1, "activation": "none", "c_in": 5, "c_out": 6}
    some = torch.zeros(100)
    pointers = dict.fromkeys(("weight", "own", "neighbors", "adjacency", "bias"), some.data_ptr())
    for name in pointers:
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            engine.add_graph_conv(**buffers, **graph, **(pointers | {name: 0}))
    straight = {"residual": -1, "c_in": 5, "c_out": 6, "bias_per_joint": False}
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            engine.add_linear(
                **buffers, **straight, **({"weight": some.data_ptr(), "bias": some.data_ptr()} | {name: 0})
            )
    engine.add_scale_shift(**buffers, normalize=False, eps=0.0, channels=5, offset=0)
    call = dict.fromkeys(("sample", "condition", "parameters", "out"), some.data_ptr())
    for name in call:
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            engine.denoise(**(call | {name: 0}), num_poses=1, num_threads=1)
    for wrong in ({"num_poses": -1}, {"num_threads": 0}):
        with pytest.raises(ValueError, match="num_poses must not be negative, num_threads positive"):
            engine.denoise(**call, **({"num_poses": 1, "num_threads": 1} | wrong))
    names = ("condition", "coefficients", "parameters", "frame_ids", "hypothesis_ids", "out")
    call = dict.fromkeys(names, some.data_ptr())
    counts = {"num_frames": 1, "num_hypotheses": 1, "num_steps": 1, "num_threads": 1}
    rest = {"noise_scale": 0, "seed": 0, "clip": None}
    for name in names:
        with pytest.raises(ValueError, match=f"{name} is a null pointer"):
            engine.sample(**(call | {name: 0}), **rest, **counts)
    for wrong, message in (
        ({"num_frames": -1}, "num_frames and num_hypotheses must not be negative"),
        ({"num_hypotheses": -1}, "num_frames and num_hypotheses must not be negative"),
        ({"num_steps": 0}, r"num_steps must lie in \[1, 65534\]"),
        ({"num_steps": 0xFFFF}, r"num_steps must lie in \[1, 65534\]"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.sample(**call, **rest, **(counts | wrong))


def test_without_the_extension_it_says_so(monkeypatch):
    from diffupose.errors import BackendUnavailableError

    monkeypatch.setattr(_backend, "_CPP", None)
    monkeypatch.setattr(_backend, "_CPP_REASON", "it is raining")
    with pytest.raises(BackendUnavailableError, match='backend "cpp" is not available: it is raining'):
        PackedDenoiser(program_of(GOOD, joints=4, widths=(5, 6)))
