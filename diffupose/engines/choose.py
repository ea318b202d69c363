"""Which engine runs a lift: asked once a lift."""

from __future__ import annotations

import os

import torch
from torch import nn

from diffupose.engines.cpp_engine import PackedDenoiser
from diffupose.engines.cuda_engine import CudaDenoiser
from diffupose.engines.engine import Engine, Precision, UnfitProgramError, check_precision
from diffupose.engines.module_engines import TritonEngine, module_engine
from diffupose.engines.programs import has_program, layer_program
from diffupose.engines.triton_network import FusedNetwork
from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import Backend, choose_backend

_NO_PROGRAM = "it runs networks of this library in evaluation mode and float32"


class EngineChooser:
    """Makes a network's engines once; changed weights, another network or another instruction set make them new.

    A change is what torch counts: in-place operations, ``load_state_dict``, new parameters. Writing through ``.data``
    or a NumPy view is not counted; ``clear`` is for that.
    """

    def __init__(self) -> None:
        self._engines: dict[tuple[object, ...], Engine | str] = {}  # or why there is none
        self._modules: list[nn.Module] = []

    def __reduce__(self) -> tuple[type[EngineChooser], tuple[()]]:
        # Copied and sent to other processes without its engines, which are made again when they are needed.
        return EngineChooser, ()

    def clear(self) -> None:
        """Forget the engines."""
        self._engines, self._modules = {}, []

    def engine_for(
        self,
        denoiser: nn.Module,
        num_timesteps: int,
        device: torch.device,
        backend: Backend | None,
        precision: Precision,
    ) -> Engine:
        """Return the engine that runs a network.

        Args:
            denoiser: The network, on the device.
            num_timesteps: Timesteps lie in [0, num_timesteps).
            device: Where the condition will be.
            backend: The backend, or ``"auto"``; None takes DIFFUPOSE_BACKEND, or else ``"auto"``.
            precision: What products are taken in.

        Raises:
            BackendUnavailableError: If the named backend cannot run.
            ValueError: If the precision is unknown, or not float32 where the module runs.
        """
        check_precision(precision)
        chosen = choose_backend(backend, device, ("cpp", "cuda", "torch", "triton"))
        reason = _NO_PROGRAM
        if chosen != "torch":
            state = self._state(denoiser)
            key = (state, precision, chosen, device, num_timesteps, os.environ.get("DIFFUPOSE_ISA"))
            if key not in self._engines:
                made = _make(denoiser, num_timesteps, chosen, device, precision)
                # The same weights in the other precision stay, older weights go.
                self._engines = {old: kept for old, kept in self._engines.items() if old[0] == state} | {key: made}
            engine = self._engines[key]
            if isinstance(engine, Engine):
                return engine
            reason = engine
        if backend in ("cpp", "cuda"):
            raise BackendUnavailableError(f'backend "{backend}" is not available: {reason}')
        if precision != "float32":
            raise ValueError(f"precision must be float32 where PyTorch runs the network, got {precision!r}")
        return module_engine(denoiser, torch.empty(0, device=device), backend)

    def _state(self, denoiser: nn.Module) -> tuple[object, ...]:
        """Return what an engine depends on, in a tenth of the time that walking the tree of modules takes."""
        if not self._modules or self._modules[0] is not denoiser:
            self._modules = list(denoiser.modules())
        state = _state_of(self._modules)
        if not any(key[0] == state for key in self._engines):
            self._modules = list(denoiser.modules())  # a module may have taken another's place
            state = _state_of(self._modules)
        return state


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


def _make(
    denoiser: nn.Module, num_timesteps: int, backend: str, device: torch.device, precision: Precision
) -> Engine | str:
    """Return the engine of a backend, or why it cannot run a network."""
    if not has_program(denoiser):
        return _NO_PROGRAM
    program = layer_program(denoiser)
    if backend == "triton":
        return TritonEngine(FusedNetwork(program, num_timesteps, precision, device))
    if backend == "cpp":
        return PackedDenoiser(program, precision)
    try:
        return CudaDenoiser(program, precision, device)
    except UnfitProgramError as error:
        return error.reason
