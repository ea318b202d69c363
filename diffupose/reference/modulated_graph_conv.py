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
