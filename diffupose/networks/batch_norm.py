"""BatchNorm over joints and poses, with statistics of the whole batch when several processes share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist


class JointBatchNorm(nn.BatchNorm1d):
    """BatchNorm over channels-last features ``[N, J, C]``: statistics per channel over poses and joints.

    ``torch.nn.SyncBatchNorm`` needs a GPU; this one also works with gloo on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[N, J, C]``."""
        flat = x.flatten(0, -2)
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._shared(flat).view_as(x)
        return super().forward(flat).view_as(x)

    def _shared(self, flat: Tensor) -> Tensor:
        count = flat.shape[0] * dist.get_world_size()
        # Two exchanges, mean first: the one-pass variance E[x^2] - E[x]^2 would lose digits.
        mean = _SumOverProcesses.apply(flat.sum(dim=0)) / count
        centered = flat - mean
        variance = _SumOverProcesses.apply(centered.square().sum(dim=0)) / count
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes; the gradient of a sum that every process uses is the sum of its gradients."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total
