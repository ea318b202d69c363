"""Which form of a network a lift runs: the module, or what the C++ engine, the CUDA engine or Triton makes of it."""

from __future__ import annotations

import os
from typing import get_args

import torch
from torch import nn

from diffupose.engines.cpp_engine import PackedDenoiser, Precision
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.cuda_plan import unfit
from diffupose.engines.programs import has_program, layer_program
from diffupose.engines.triton_network import FusedNetwork
from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import Backend, choose_backend, cuda

Packed = PackedDenoiser | FusedNetwork


class Packer:
    """Packs a network once; changed weights, another network or another instruction set make it new.

    A change is what torch counts: in-place operations, ``load_state_dict``, new parameters. Writing through ``.data``
    or a NumPy view is not counted; ``clear`` is for that.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[object, ...], Packed | str] = {}  # or why it cannot be packed
        self._modules: list[nn.Module] = []

    def __reduce__(self) -> tuple[type[Packer], tuple[()]]:
        # Copied and sent to other processes without what it packed, which is made again when it is needed.
        return Packer, ()

    def clear(self) -> None:
        """Forget what was packed."""
        self._packed, self._modules = {}, []

    def _state(self, denoiser: nn.Module) -> tuple[object, ...]:
        """Return what packing depends on, in a tenth of the time that walking the tree of modules takes."""
        if not self._modules or self._modules[0] is not denoiser:
            self._modules = list(denoiser.modules())
        state = _state_of(self._modules)
        if not any(key[0] == state for key in self._packed):
            self._modules = list(denoiser.modules())  # a module may have taken another's place
            state = _state_of(self._modules)
        return state

    def network(
        self,
        denoiser: nn.Module,
        num_timesteps: int,
        device: torch.device,
        backend: Backend | None,
        precision: Precision,
    ) -> nn.Module | PackedDenoiser:
        """Return the packed network where a backend is chosen that packs and can run it, else the module.

        Raises:
            BackendUnavailableError: If the named backend cannot run.
            ValueError: If the precision is unknown, or not float32 where the module runs.
        """
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        chosen = choose_backend(backend, device, ("cpp", "cuda", "torch", "triton"))
        reason = "it runs networks of this library in evaluation mode and float32"
        if chosen != "torch":
            state = self._state(denoiser)
            key = (state, precision, chosen, device, num_timesteps, os.environ.get("DIFFUPOSE_ISA"))
            if key not in self._packed:
                fits = has_program(denoiser)
                packed = _pack(denoiser, num_timesteps, chosen, device, precision) if fits else reason
                # The same weights in the other precision stay, older weights go.
                self._packed = {old: kept for old, kept in self._packed.items() if old[0] == state} | {key: packed}
            packed = self._packed[key]
            if not isinstance(packed, str):
                return packed
            reason = packed
        if backend in ("cpp", "cuda"):
            raise BackendUnavailableError(f'backend "{backend}" is not available: {reason}')
        if precision != "float32":
            raise ValueError(f"precision must be float32 where PyTorch runs the network, got {precision!r}")
        return denoiser


def _state_of(modules: list[nn.Module]) -> tuple[object, ...]:
    state: list[object] = []
    for module in modules:
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        state.append((id(module), module.training, *hooks, *map(id, module._modules.values())))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                version = 0 if tensor.is_inference() else tensor._version
                state.append((tensor.data_ptr(), version, tensor.dtype))
    return tuple(state)


def _pack(
    denoiser: nn.Module, num_timesteps: int, backend: str, device: torch.device, precision: Precision
) -> Packed | str:
    """Return a network packed for a backend, or why that cannot run it."""
    program = layer_program(denoiser)
    if backend == "triton":
        return FusedNetwork(program, num_timesteps, precision, device)
    if backend == "cpp":
        return PackedDenoiser(program, precision)
    return unfit(program, cuda().MAX_JOINTS) or CudaDenoiser(program, precision, device)
