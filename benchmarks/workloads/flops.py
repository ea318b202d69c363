"""How many operations a network needs: the one count that every benchmark quotes."""

from __future__ import annotations

from diffupose.networks.blocks import ModulatedGraphConv
from diffupose.networks.modulated_gcn import ModulatedGCN
from diffupose.networks.parallel_gcn import JointAttention, ParallelGCN


def denoiser_flops(denoiser: ModulatedGCN | ParallelGCN, num_joints: int) -> int:
    """Return the floating-point operations of one call for one pose.

    A multiply-add is two. Products of graph convolutions (2 J C_in 2 C_out, and 2 J^2 C_out for the adjacency), linear
    layers over joints and attention count; time embeddings, which are tabulated, and activations do not.
    """
    total = 0
    for module in denoiser.modules():
        if isinstance(module, ModulatedGraphConv):
            _, c_in, c_out = module.weight.shape
            total += 4 * num_joints * c_in * c_out + 2 * num_joints**2 * c_out
        elif isinstance(module, JointAttention):
            channels = module.out.in_features
            total += 2 * num_joints * channels * 4 * channels + 4 * num_joints**2 * channels
    if isinstance(denoiser, ModulatedGCN):
        inner, channels = denoiser.non_local.theta.weight.shape
        return total + 2 * num_joints * 4 * inner * channels + 4 * num_joints**2 * inner
    return total + 2 * num_joints * (denoiser.input.weight.numel() + denoiser.output.weight.numel())
