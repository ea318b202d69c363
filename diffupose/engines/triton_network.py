"""A layer program run by PyTorch's matrix products and Triton's kernel for what follows them.

For GPUs without the CUDA extension: a graph convolution is two kernels, whatever stands behind it (BatchNorm, ReLU,
residual, time block), and the weights lie as the products read them. ``captured_loop`` replays it as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffupose.engines.engine import Precision, check_precision
from diffupose.engines.layer_program import Attention, GraphConv, Layer, LayerProgram, Linear, ScaleShift


class FusedNetwork(nn.Module):
    """A denoiser for one timestep at a time, from its layer program.

    Args:
        program: The layers.
        num_timesteps: Timesteps lie in [0, num_timesteps): scales and shifts are tabulated for all of them, so that the
            timestep is read on the device.
        precision: ``"float32"``, or ``"bfloat16"`` for products and activations between the first layer and the last,
            whose coordinates are float32.
        device: Where the weights go.

    Raises:
        ValueError: If the precision is unknown.
    """

    def __init__(
        self, program: LayerProgram, num_timesteps: int, precision: Precision, device: torch.device | str
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.precision, self.num_timesteps = precision, num_timesteps
        pairs = program.tabulate(torch.arange(num_timesteps))
        tables = [torch.cat(pair, dim=-1) for pair in pairs]  # [T, 2 C] each: scales, shifts
        small = torch.bfloat16 if precision == "bfloat16" else torch.float32
        last = len(program.widths) - 1
        steps: list[_Step] = []
        for layer in program.layers:
            before = steps[-1] if steps else None
            if isinstance(layer, ScaleShift) and isinstance(before, _GraphConv) and before.takes(layer):
                before.film = tables[layer.slot]  # in the same kernel
                continue
            product = torch.float32 if layer.input == 0 or layer.output == last else small
            stored = torch.float32 if layer.output == last else small
            steps.append(_STEPS[type(layer)](layer, _Context(product, stored, tables)))
        self.steps = nn.ModuleList(steps)
        self._last = last
        self.eval().to(device)

    def forward(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Denoise.

        Args:
            sample: x_t of shape ``[N, J, 3]``.
            condition: ``[N, J, C]``.
            timesteps: One integer for all, ``[1]``.

        Returns:
            ``[N, J, C_out]``, float32.
        """
        if timesteps.shape != (1,):
            raise ValueError(f"timesteps must have shape [1], got {tuple(timesteps.shape)}")
        buffers = {0: torch.cat((sample, condition), dim=-1).float()}  # [N, J, 3 + C]
        for step in self.steps:
            assert isinstance(step, _Step)
            residual = buffers[step.residual] if step.residual >= 0 else None
            buffers[step.output] = step(buffers[step.input], residual, timesteps)
        return buffers[self._last]


@dataclass(frozen=True)
class _Context:
    """What a layer does not say itself."""

    product: torch.dtype  # that its product is taken in
    stored: torch.dtype  # of its output
    tables: list[Tensor]  # [T, 2 C] of every slot


class _Step(nn.Module):
    """A layer, with its tensors as buffers; ``forward(x, residual, timesteps)`` maps ``[N, J, C_in]``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.input, self.output = layer.input, layer.output
        self.residual = layer.residual

    def keep(self, **tensors: Tensor | None) -> None:
        """Register tensors, in memory of their own."""
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone().contiguous())


class _GraphConv(_Step):
    weight: Tensor  # [C_in, 2 C_out]
    own: Tensor  # [J, C_out]
    neighbors: Tensor  # [J, C_out]
    adjacency: Tensor  # [J, J]
    bias: Tensor  # [C_out]
    film: Tensor | None  # [T, 2 C_out]

    def __init__(self, layer: GraphConv, context: _Context) -> None:
        super().__init__(layer)
        weight = torch.cat((layer.weight[0], layer.weight[1]), dim=-1).to(context.product)
        self.keep(weight=weight, own=layer.own, neighbors=layer.neighbors, adjacency=layer.adjacency, bias=layer.bias)
        self.keep(film=None)
        self.activation, self.stored = layer.activation, context.stored

    def takes(self, layer: ScaleShift) -> bool:
        """Return whether a layer scales and shifts this one's output in its place."""
        return not layer.normalize and layer.input == layer.output == self.output and self.film is None

    def forward(self, x: Tensor, residual: Tensor | None, timesteps: Tensor) -> Tensor:
        from diffupose.kernels.modulated_graph_conv import Epilogue, modulated_graph_conv_fwd

        hidden = torch.mm(x.flatten(0, 1).to(self.weight.dtype), self.weight)  # [N J, 2 C_out]
        out = x.new_empty(*x.shape[:2], self.bias.shape[0], dtype=self.stored)
        return modulated_graph_conv_fwd(
            hidden, self.neighbors, self.adjacency, self.bias, out, own=self.own,
            epilogue=Epilogue(self.activation, residual, self.film, timesteps),
        )  # fmt: skip


class _Linear(_Step):
    weight: Tensor  # [C_in, C_out]
    bias: Tensor  # [C_out] or [J, C_out]

    def __init__(self, layer: Linear, context: _Context) -> None:
        super().__init__(layer)
        self.keep(weight=layer.weight.to(context.product), bias=layer.bias.to(context.product))
        self.stored = context.stored

    def forward(self, x: Tensor, residual: Tensor | None, timesteps: Tensor) -> Tensor:
        rows, dtype = x.flatten(0, 1).to(self.weight.dtype), self.weight.dtype
        if residual is None and self.bias.ndim == 1:
            out = torch.addmm(self.bias, rows, self.weight).unflatten(0, x.shape[:2])
        elif residual is None:
            out = torch.mm(rows, self.weight).unflatten(0, x.shape[:2]) + self.bias
        else:
            out = torch.addmm(residual.flatten(0, 1).to(dtype), rows, self.weight).unflatten(0, x.shape[:2]) + self.bias
        return out.to(self.stored)


class _ScaleShift(_Step):
    table: Tensor  # [T, 2 C]

    def __init__(self, layer: ScaleShift, context: _Context) -> None:
        super().__init__(layer)
        self.keep(table=context.tables[layer.slot].to(context.stored))
        self.normalize, self.eps = layer.normalize, layer.eps

    def forward(self, x: Tensor, residual: Tensor | None, timesteps: Tensor) -> Tensor:
        scale, shift = self.table.index_select(0, timesteps)[0].chunk(2)  # [C] each
        if self.normalize:
            return functional.layer_norm(x, scale.shape, scale, shift, self.eps)
        return functional.silu(torch.addcmul(shift, x, scale))


class _Attention(_Step):
    def __init__(self, layer: Attention, context: _Context) -> None:
        super().__init__(layer)
        self.num_heads = layer.num_heads

    def forward(self, x: Tensor, residual: Tensor | None, timesteps: Tensor) -> Tensor:
        query, key, value = x.float().unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, J, c]
        attended = torch.softmax(query @ key.transpose(-2, -1), dim=-1) @ value
        return attended.transpose(1, 2).flatten(2).to(x.dtype)


_STEPS: dict[type, Callable[[Any, _Context], _Step]] = {
    GraphConv: _GraphConv,
    Linear: _Linear,
    ScaleShift: _ScaleShift,
    Attention: _Attention,
}
