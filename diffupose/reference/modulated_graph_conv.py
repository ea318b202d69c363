"""The modulated graph convolution (paper eq. 6-7, with the weight modulation of its reference [53])."""

from __future__ import annotations

import torch
from torch import Tensor


def modulated_graph_conv(
    x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return ``diag(A) (M * x W0) + offdiag(A) (M * x W1) + bias``.

    Column c of a weight scaled by ``modulation[j, c]`` is joint j's own, unshared weight.

    Args:
        x: Features of shape ``[N, J, C_in]``.
        weight: ``[2, C_in, C_out]``: 0 for the joint itself, 1 for its neighbours.
        modulation: ``[J, C_out]``.
        adjacency: ``[J, J]``, already modulated and symmetrised.
        bias: ``[C_out]`` or None.

    Returns:
        Features of shape ``[N, J, C_out]``.
    """
    # One product with both weights side by side is faster than two.
    hidden = x @ torch.cat((weight[0], weight[1]), dim=-1)  # [N, J, 2 C_out]
    own, neighbors = hidden.chunk(2, dim=-1)  # [N, J, C_out] each
    diagonal = torch.diagonal(adjacency)
    out = (diagonal.unsqueeze(-1) * modulation) * own
    out = out + (adjacency - torch.diag(diagonal)) @ (modulation * neighbors)
    return out if bias is None else out + bias


def modulated_graph_conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, adjacency: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, modulation, adjacency and bias in closed form.

    With the hidden features ``own = x W0`` and ``neighbors = x W1``, and ``back = offdiag(A)^T grad_out``:

        grad_own = diag(A) M * grad_out                   grad_neighbors = M * back
        grad_M   = sum_n diag(A) own * grad_out + neighbors * back
        grad_A   = sum_n grad_out (M * neighbors)^T  off the diagonal,  sum_n,c M * own * grad_out  on it

    Args:
        grad_out: ``[N, J, C_out]``.
        x: ``[N, J, C_in]``.
        weight: ``[2, C_in, C_out]``.
        modulation: ``[J, C_out]``.
        adjacency: ``[J, J]``.
    """
    both = torch.cat((weight[0], weight[1]), dim=-1)  # [C_in, 2 C_out]
    own, neighbors = (x @ both).chunk(2, dim=-1)
    diagonal = torch.diagonal(adjacency)
    back = (adjacency - torch.diag(diagonal)).T @ grad_out  # [N, J, C_out]
    grad_hidden = torch.cat((diagonal.unsqueeze(-1) * modulation * grad_out, modulation * back), dim=-1)
    own_sum = (own * grad_out).sum(dim=0)  # [J, C_out]
    grad_modulation = diagonal.unsqueeze(-1) * own_sum + (neighbors * back).sum(dim=0)
    outer = (grad_out @ (modulation * neighbors).transpose(-2, -1)).sum(dim=0)  # [J, J]
    grad_adjacency = outer - torch.diag(torch.diagonal(outer)) + torch.diag((modulation * own_sum).sum(dim=-1))
    grad_both = x.flatten(0, 1).T @ grad_hidden.flatten(0, 1)  # [C_in, 2 C_out]
    grad_weight = torch.stack(grad_both.chunk(2, dim=-1))
    return grad_hidden @ both.T, grad_weight, grad_modulation, grad_adjacency, grad_out.sum(dim=(0, 1))
