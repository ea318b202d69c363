"""The layer programs of our denoisers: what the fused engines run instead of the modules."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffupose.engines.layer_program import Activation, Attention, GraphConv, Layer, LayerProgram, Linear, ScaleShift
from diffupose.networks.batch_norm import JointBatchNorm
from diffupose.networks.blocks import GraphConvBlock, ModulatedGraphConv
from diffupose.networks.modulated_gcn import ModulatedGCN
from diffupose.networks.parallel_gcn import ParallelBlock, ParallelGCN

_Module = TypeVar("_Module", bound=nn.Module)


def has_program(denoiser: nn.Module) -> bool:
    """Return whether a network is one of ours, in evaluation mode and float32, without hooks."""
    return (
        type(denoiser) in (ModulatedGCN, ParallelGCN)
        and not denoiser.training
        and not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
        and all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())
    )


def layer_program(denoiser: nn.Module) -> LayerProgram:
    """Return the program of a network.

    Raises:
        ValueError: If it has none (``has_program``).
    """
    if not has_program(denoiser):
        raise ValueError(
            f"denoiser must be a network of this library in evaluation mode, got {type(denoiser).__name__}"
        )
    if any(parameter.device.type != "cpu" for parameter in denoiser.parameters()):
        denoiser = copy.deepcopy(denoiser).cpu()  # folded there, in float64, whatever runs it
    if isinstance(denoiser, ModulatedGCN):
        return _modulated_gcn(denoiser)
    assert isinstance(denoiser, ParallelGCN)
    return _parallel_gcn(denoiser)


def _graph_conv(
    gconv: ModulatedGraphConv,
    bn: JointBatchNorm | None,
    source: int,
    target: int,
    activation: Activation,
    residual: int = -1,
) -> GraphConv:
    adjacency = gconv.modulated_adjacency().double()
    diagonal = torch.diagonal(adjacency)
    scale, shift = _fold(bn, gconv.bias.double())
    modulation = scale * gconv.modulation.double()  # [J, C_out]
    return GraphConv(
        source, target, gconv.weight.detach(), (diagonal.unsqueeze(-1) * modulation).float(), modulation.float(),
        (adjacency - torch.diag(diagonal)).float(), shift.float(), activation, residual,
    )  # fmt: skip


def _fold(bn: JointBatchNorm | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return what BatchNorm makes of y + bias, as scale * y + shift."""
    if bn is None:
        return torch.ones_like(bias), bias
    assert bn.running_var is not None and bn.running_mean is not None  # our layers track them
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, scale * (bias - bn.running_mean.double()) + bn.bias.double()


def _in_float64(module: _Module) -> _Module:
    """Return a copy for what is tabulated, whose result in float32 is the same for any number of timesteps and threads.

    That of a product in float32 is not, in the last bits, and poses are to be the same bits. A copy also stays as it is
    when the network changes, as the packed weights do.
    """
    return copy.deepcopy(module).double()


@torch.no_grad()
def _modulated_gcn(net: ModulatedGCN) -> LayerProgram:
    width, channels = net.config.hidden_dim, 3 + net.config.num_condition_channels
    source, x, hidden, qkv, attended, output = range(6)
    layers: list[Layer] = []
    blocks: list[nn.Module] = []  # the linear layers of the time blocks, in the order of their slots

    def graph_block(block: nn.Module, source: int, target: int, residual: int = -1) -> None:
        assert isinstance(block, GraphConvBlock)
        layers.append(_graph_conv(block.gconv, block.bn, source, target, "relu", residual))

    def time_block(index: int) -> None:
        layers.append(ScaleShift(x, x, len(blocks), width, normalize=False))
        blocks.append(net.time_blocks[index].get_submodule("linear"))

    def non_local() -> None:
        block = net.non_local
        parts = (block.theta, block.phi, block.g)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        layers.append(Linear(x, qkv, weight.T, bias))
        layers.append(Attention(qkv, attended, 1, width // 2))
        scale, shift = _fold(block.bn, block.out.bias.double())
        layers.append(Linear(attended, x, (scale * block.out.weight.double().T).float(), shift.float(), residual=x))

    graph_block(net.gconv_input, source, x)
    between = net.config.time_blocks == "between"
    for index, pair in enumerate(net.gconv_layers):
        assert isinstance(pair, nn.Sequential)
        graph_block(pair[0], x, hidden)
        graph_block(pair[1], hidden, x, residual=x)
        if between:
            time_block(index)
    if between:
        non_local()
    else:
        time_block(0)
        non_local()
        time_block(1)
    layers.append(_graph_conv(net.gconv_output, None, x, output, "none"))

    time_mlp, linears = _in_float64(net.time_mlp), [_in_float64(linear) for linear in blocks]

    @torch.no_grad()
    def tabulate(timesteps: Tensor) -> list[tuple[Tensor, Tensor]]:
        embedding = functional.silu(time_mlp(timesteps))
        pairs = (linear(embedding).chunk(2, dim=-1) for linear in linears)
        return [((1 + scale).float(), shift.float()) for scale, shift in pairs]

    widths = (channels, width, width, 3 * (width // 2), width // 2, channels)
    return LayerProgram(net.gconv_output.adjacency.shape[0], widths, tuple(layers), tabulate)


@torch.no_grad()
def _parallel_gcn(net: ParallelGCN) -> LayerProgram:
    width = net.config.hidden_dim
    source, x, hidden, inner, qkv, output = range(6)
    layers: list[Layer] = [
        Linear(source, x, net.input.weight.T, net.input.bias + net.joint_embedding),
    ]
    blocks = [block for block in net.blocks if isinstance(block, ParallelBlock)]
    for slot, block in enumerate(blocks):
        layers.append(ScaleShift(x, hidden, slot, width, normalize=True, eps=block.norm.eps))
        layers.append(_graph_conv(block.gconv1, None, hidden, inner, "gelu"))
        layers.append(_graph_conv(block.gconv2, None, inner, x, "none", residual=x))
        attention = block.attention
        if attention is None:
            continue
        channels = width // attention.num_heads
        # The softmax's scale sits in the queries' weights.
        scale = torch.ones(3 * width, dtype=torch.float32)
        scale[:width] = channels**-0.5
        layers.append(Linear(hidden, qkv, (scale * attention.qkv.weight.T), scale * attention.qkv.bias))
        layers.append(Attention(qkv, inner, attention.num_heads, channels))
        layers.append(Linear(inner, x, attention.out.weight.T, attention.out.bias, residual=x))
    layers.append(ScaleShift(x, hidden, len(blocks), width, normalize=True, eps=net.norm.eps))
    layers.append(Linear(hidden, output, net.output.weight.T, net.output.bias))

    time_mlp, final = _in_float64(net.time_mlp), _in_float64(net.norm)
    norms = [_in_float64(block.norm) for block in blocks]
    films = [None if block.film is None else _in_float64(block.film) for block in blocks]

    @torch.no_grad()
    def tabulate(timesteps: Tensor) -> list[tuple[Tensor, Tensor]]:
        embedding = functional.silu(time_mlp(timesteps))
        pairs = []
        for film, norm in zip([*films, None], [*norms, final], strict=True):
            # Without a FiLM: the norm's own, at every timestep.
            modulation = embedding.new_zeros(len(timesteps), 2 * width) if film is None else film(embedding)
            scale, shift = modulation.chunk(2, dim=-1)  # [S, C] each
            pairs.append(((norm.weight * (1 + scale)).float(), (norm.bias * (1 + scale) + shift).float()))
        return pairs

    widths = (net.input.in_features, width, width, width, 3 * width, 3)
    return LayerProgram(net.joint_embedding.shape[0], widths, tuple(layers), tabulate)
