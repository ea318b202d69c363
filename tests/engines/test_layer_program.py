"""A layer program checks itself when it is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.random_layers import graph_conv, linear, program_of

from diffupose.engines.layer_program import Attention, ScaleShift

GOOD = graph_conv(0, 1, 17, 5, 33)
STRAIGHT = linear(0, 1, 17, 5, 33)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (replace(GOOD, bias=torch.zeros(1)), r"bias must have shape \[33\], got \(1,\)"),
        (replace(GOOD, own=torch.zeros(5, 33)), r"own must have shape \[17, 33\], got \(5, 33\)"),
        (replace(GOOD, own=torch.zeros(33)), r"own must have shape \[17, 33\], got \(33,\)"),
        (replace(GOOD, neighbors=torch.zeros(3, 33)), r"neighbors must have shape \[17, 33\], got \(3, 33\)"),
        (replace(GOOD, adjacency=torch.zeros(3, 3)), r"adjacency must have shape \[17, 17\], got \(3, 3\)"),
        (replace(GOOD, weight=torch.zeros(5, 33)), r"weight must have shape \[2, C_in, C_out\], got \(5, 33\)"),
        (replace(GOOD, activation="tanh"), "activation must be none, relu or gelu, got 'tanh'"),
        (replace(STRAIGHT, bias=torch.zeros(5, 33)), r"bias must have shape \[33\] or \[17, 33\], got \(5, 33\)"),
        (replace(STRAIGHT, weight=torch.zeros(5)), r"weight must have shape \[C_in, C_out\], got \(5,\)"),
        (Attention(0, 1, 0, 1), "attention needs a head and a channel, got 0 and 1"),
        (ScaleShift(0, 1, 0, 0, normalize=False), "channels must be at least 1, got 0"),
    ],
)
def test_layers_that_do_not_fit(layer, message):
    with pytest.raises(ValueError, match=message):
        program_of(layer, joints=17, widths=(5, 33))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([linear(0, 1, 17, 6, 3)], "input of layer 0 must be 6 wide, buffer 0 is 5 wide"),
        ([linear(0, 1, 17, 5, 4)], "output of layer 0 must be 4 wide, buffer 1 is 3 wide"),
        ([linear(0, 2, 17, 5, 3)], r"output of layer 0 must lie in \[0, 2\), got 2"),
        ([linear(-1, 1, 17, 5, 3)], r"input of layer 0 must lie in \[0, 2\), got -1"),
        ([linear(0, 1, 17, 5, 3, residual=0)], "residual of layer 0 must be 3 wide, buffer 0 is 5 wide"),
        ([linear(0, 1, 17, 5, 3, residual=1)], "residual of layer 0 must be written before it, buffer 1 is not"),
        ([linear(0, 1, 17, 5, 3), linear(1, 1, 17, 3, 3)], "layer 1 must not overwrite its input, buffer 1"),
        ([ScaleShift(0, 0, 0, 5, normalize=False)], "a layer must write the last buffer, 1"),
        ([ScaleShift(0, 0, 1, 5, normalize=False)], "slots must count the layers .*, expected 0, got 1"),
        ([], "a layer must write the last buffer, 1"),
    ],
)
def test_buffers_that_do_not_fit(layers, message):
    with pytest.raises(ValueError, match=message):
        program_of(*layers, joints=17, widths=(5, 3))
