"""Autograd of the modulated graph convolution: one function for eager mode, one for compilers and modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffupose.ops import _graph_conv_passes as passes


class EagerGraphConv(torch.autograd.Function):
    """Autograd in eager mode with few calls: small batches wait for the host.

    It calls the passes without the dispatcher and prepares the weights once for both passes. A ``forward`` that takes
    ``ctx`` costs a third of ``setup_context``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        modulation: Tensor,
        adjacency: Tensor,
        bias: Tensor | None,
        product: torch.dtype,
        backend: str,
    ) -> Tensor:
        features = x.to(product).contiguous()
        parameters = passes.prepare(weight, product, modulation, adjacency)
        out, hidden = passes.forward(features, parameters, bias, modulation.dtype, backend)
        ctx.save_for_backward(features, *parameters, hidden)
        ctx.dtypes, ctx.backend = (x.dtype, weight.dtype, modulation.dtype), backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable is slow, and needed only where gradients are recorded.
        if torch.is_grad_enabled():
            return once_differentiable(EagerGraphConv._gradients)(ctx, grad_out)
        return EagerGraphConv._gradients(ctx, grad_out)

    @staticmethod
    def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        features, *parameters, hidden = ctx.saved_tensors
        for_x, for_weight, for_modulation, for_adjacency, for_bias, *_ = ctx.needs_input_grad
        x_dtype, weight_dtype, dtype = ctx.dtypes
        grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias = passes.backward(
            grad_out, features, passes.Parameters(*parameters), hidden,
            (x_dtype if for_x else None, weight_dtype if for_weight else None), ctx.backend,
        )  # fmt: skip
        return (
            grad_x,
            grad_weight,
            grad_modulation.to(dtype) if for_modulation else None,
            grad_adjacency.to(dtype) if for_adjacency else None,
            grad_bias.to(dtype) if for_bias else None,
            None,
            None,
        )


class TracedGraphConv(torch.autograd.Function):
    """Autograd around the raw ops, so that compilers and modes see these and all casts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        modulation: Tensor,
        adjacency: Tensor,
        bias: Tensor | None,
        backend: str,
    ) -> Tensor:
        out, hidden = torch.ops.diffupose.modulated_graph_conv_fwd.default(
            x, weight, modulation, adjacency, bias, backend
        )
        ctx.save_for_backward(x, weight, modulation, adjacency, hidden)
        ctx.has_bias, ctx.backend = bias is not None, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, modulation, adjacency, hidden = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weight, grad_modulation, grad_adjacency, grad_bias = (
            torch.ops.diffupose.modulated_graph_conv_bwd.default(
                grad_out, x, weight, modulation, adjacency, hidden, needs_x, ctx.backend
            )
        )
        return (
            grad_x if needs_x else None,
            grad_weight,
            grad_modulation,
            grad_adjacency,
            grad_bias if ctx.has_bias else None,
            None,
        )
