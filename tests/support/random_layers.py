"""Layers whose every number is random, and programs of them."""

from __future__ import annotations

import torch

from diffupose.engines.layer_program import GraphConv, Layer, LayerProgram, Linear


def program_of(*layers: Layer, joints: int, widths: tuple[int, ...], parameters=()) -> LayerProgram:
    """Return a program whose scales and shifts are those given."""
    return LayerProgram(joints, tuple(widths), layers, lambda timesteps: list(parameters))


def graph_conv(source: int, target: int, joints: int, c_in: int, c_out: int, **options) -> GraphConv:
    """A graph convolution; the scale of its output is about that of its input."""
    adjacency = torch.randn(joints, joints) * joints**-0.5
    return GraphConv(
        source, target, torch.randn(2, c_in, c_out) * c_in**-0.5, torch.randn(joints, c_out),
        torch.randn(joints, c_out), adjacency - torch.diag(adjacency.diagonal()), torch.randn(c_out), **options,
    )  # fmt: skip


def linear(source: int, target: int, joints: int, c_in: int, c_out: int, **options) -> Linear:
    """A linear layer; its bias is random per joint."""
    return Linear(source, target, torch.randn(c_in, c_out) * c_in**-0.5, torch.randn(joints, c_out), **options)
