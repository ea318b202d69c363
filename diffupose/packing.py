"""Which form of a network a lift runs: the module, or what the C++ engine packs from it."""

from __future__ import annotations

import os
from typing import get_args

import torch
from torch import nn

from diffupose.errors import BackendUnavailableError
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.denoise import PackedDenoiser, Precision
from diffupose.programs import has_program, layer_program


class Packer:
    """Packs a network once; changed weights, another network or another instruction set make it new.

    A change is what torch counts: in-place operations, ``load_state_dict``, new parameters. Writing through ``.data``
    or a NumPy view is not counted; ``clear`` is for that.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[object, ...], PackedDenoiser] = {}

    def __reduce__(self) -> tuple[type[Packer], tuple[()]]:
        # Copied and sent to other processes without what it packed, which is made again when it is needed.
        return Packer, ()

    def clear(self) -> None:
        """Forget what was packed."""
        self._packed = {}

    def network(
        self, denoiser: nn.Module, device: torch.device, backend: Backend | None, precision: Precision
    ) -> nn.Module | PackedDenoiser:
        """Return the packed network where the C++ engine is chosen and can run it, else the module.

        Raises:
            BackendUnavailableError: If the named backend cannot run.
            ValueError: If the precision is unknown, or not float32 where the module runs.
        """
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        if choose_backend(backend, device, ("cpp", "torch", "triton")) == "cpp" and has_program(denoiser):
            tensors = (*denoiser.parameters(), *denoiser.buffers())
            versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
            key = (id(denoiser), versions, precision, os.environ.get("DIFFUPOSE_ISA"))
            if key not in self._packed:
                packed = PackedDenoiser(layer_program(denoiser), precision)
                # The same weights in the other precision stay, older weights go.
                self._packed = {old: kept for old, kept in self._packed.items() if old[:2] == key[:2]} | {key: packed}
            return self._packed[key]
        if backend == "cpp":
            reason = "it runs networks of this library in evaluation mode and float32"
            raise BackendUnavailableError(f'backend "cpp" is not available: {reason}')
        if precision != "float32":
            raise ValueError(f"precision must be float32 without the C++ engine, got {precision!r}")
        return denoiser
