"""Layer programs in plain formulas, in any precision: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from diffupose.engines.layer_program import Attention, GraphConv, Layer, LayerProgram, Linear, ScaleShift

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "gelu": functional.gelu}


def through_bfloat16(x: Tensor) -> Tensor:
    """Return the nearest bfloat16 values in the type of x."""
    return x.to(torch.float32).to(torch.bfloat16).to(x.dtype)


def run_program(
    program: LayerProgram,
    sample: Tensor,
    condition: Tensor,
    timesteps: Tensor,
    dtype: torch.dtype = torch.float64,
    rounding: Callable[[Tensor], Tensor] = lambda x: x,
    storing: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the output buffer ``[N, J, width]``.

    ``rounding`` is applied to both operands of every product, ``storing`` to all buffers but the output; what a layer
    scales and shifts in place, without normalising, was not stored before.
    """
    buffers = {0: storing(torch.cat((sample, condition), dim=-1).to(dtype))}
    parameters = [(scale.to(dtype), shift.to(dtype)) for scale, shift in program.tabulate(timesteps)]
    for layer, following in zip(program.layers, (*program.layers[1:], None), strict=True):
        result = _apply(layer, buffers[layer.input], parameters, rounding)
        residual = layer.residual
        if residual >= 0:
            result = result + buffers[residual][..., : result.shape[-1]]
        is_output = layer.output == len(program.widths) - 1
        buffers[layer.output] = result if is_output or _scales_in_place(following, layer) else storing(result)
    return buffers[len(program.widths) - 1]


def _scales_in_place(layer: Layer | None, before: Layer) -> bool:
    return isinstance(layer, ScaleShift) and not layer.normalize and layer.input == layer.output == before.output


def _apply(
    layer: Layer, x: Tensor, parameters: list[tuple[Tensor, Tensor]], rounding: Callable[[Tensor], Tensor]
) -> Tensor:
    if isinstance(layer, GraphConv):
        x = rounding(x[..., : layer.weight.shape[1]])
        own, neighbors = (x @ rounding(weight.to(x.dtype)) for weight in layer.weight)  # [N, J, C_out]
        mixed = layer.adjacency.to(x.dtype) @ (layer.neighbors.to(x.dtype) * neighbors)
        return ACTIVATIONS[layer.activation](layer.own.to(x.dtype) * own + mixed + layer.bias.to(x.dtype))
    if isinstance(layer, Linear):
        x = rounding(x[..., : layer.weight.shape[0]])
        return x @ rounding(layer.weight.to(x.dtype)) + layer.bias.to(x.dtype)
    if isinstance(layer, Attention):
        width = layer.num_heads * layer.channels
        heads = x[..., : 3 * width].unflatten(-1, (3, layer.num_heads, layer.channels))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [N, heads, J, channels] each
        attended = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        return attended.transpose(1, 2).flatten(2)
    scale, shift = parameters[layer.slot]
    x = x[..., : layer.channels]
    if not layer.normalize:
        return functional.silu(x * scale + shift)
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / (centered.square().mean(dim=-1, keepdim=True) + layer.eps).sqrt() * scale + shift
