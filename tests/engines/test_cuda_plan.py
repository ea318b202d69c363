"""What the CUDA engine packs, what fits, and what it refuses; emulated where there is no GPU."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from support.cuda_engines import CONFIGS, packed_of, table_of
from support.random_denoisers import denoiser_config, random_denoiser
from support.random_layers import graph_conv, linear, program_of

from diffupose import ops
from diffupose.engines.cuda_layouts import LayoutName
from diffupose.engines.cuda_plan import pack_program, unfit
from diffupose.engines.layer_program import Attention, ScaleShift
from diffupose.engines.programs import layer_program
from diffupose.ops import _backend

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
    for config, layout in itertools.product(CONFIGS.values(), get_args(LayoutName)):
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
    again = program_of(linear(0, 1, 17, 5, 48), Attention(1, 2, 1, 16), linear(1, 3, 17, 48, 3),
                       joints=17, widths=(5, 48, 16, 3))  # fmt: skip
    for program, message in (
        (heads, "heads of a multiple of 16 channels, got 8"),
        (alone, "attention behind the linear layer of its queries, keys and values only"),
        (many, "takes 18 joints at most, got 19"),
        (scaled, "a last buffer that a product writes and nothing reads"),
        (again, "queries, keys and values that attention alone reads"),
    ):
        assert message in unfit(program, 18)
        with pytest.raises(ValueError, match=message):
            packed_of(program, gpu)


def test_sizes_and_offsets_out_of_bounds(gpu):
    """The binding by itself: an address is never computed from what overflows."""
    extension = _backend.cuda()
    layer = {"kind": "scale_shift", "input_blocks": 1, "output_blocks": 1, "input": 0, "output": 0}
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
