"""The CUDA engine: on a GPU where there is one, else emulated on the CPU from the same .cu files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cuda_engines import CONFIGS, STEP, packed_of
from support.plain_program import run_program, through_bfloat16
from support.random_denoisers import SKELETON_OF, in_float64, random_denoiser, random_inputs
from support.random_layers import graph_conv, linear, program_of
from support.tiny_lifters import people, tiny_lifter

from diffupose.engines.layer_program import Attention, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.errors import BackendUnavailableError
from diffupose.testing import assert_parity

# --- Layers ----------------------------------------------------------------------------------------------------------


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
