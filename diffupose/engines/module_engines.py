"""A module as an engine: run step by step by PyTorch, or in a captured loop with the Triton step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffupose.engines import captured_loop
from diffupose.engines.engine import Engine, SampleRequest
from diffupose.engines.triton_network import FusedNetwork
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.philox_normal import philox_normal
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.reference.sample import sample as reference_sample

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(sample [N, J, 3], condition [N, J, C], timesteps [1]) -> [N, J, 3 or more]``, such as an ``nn.Module``."""


class ModuleEngine(Engine):
    """The reference's loop over a network.

    Args:
        network: The network.
        noise_backend: What draws the noise; None takes the fastest that there is.
    """

    backend: Backend = "torch"

    def __init__(self, network: Network, noise_backend: Backend | None = None) -> None:
        self.network, self._noise_backend = network, noise_backend

    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output; see ``Engine.denoise``."""
        return self.network(sample, condition, timesteps)

    def sample(self, request: SampleRequest) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        table, device = request.table, request.condition.device
        scale = table.noise_scale_tensor()
        return reference_sample(
            self.network,
            request.condition,
            table.tensor(),
            torch.from_numpy(table.timesteps).to(device),
            partial(self._noise, request),
            request.clip_sample_range,
            None if scale is None else scale.to(device),
        )

    def _noise(self, request: SampleRequest, step: int) -> Tensor:
        """Return the noise ``[B, H, J, 3]`` of a step."""
        ids, (*_, joints, axes) = (request.frame_ids, request.hypothesis_ids), request.shape
        drawn = philox_normal(request.seed, *ids, step, joints * axes, backend=self._noise_backend)
        return drawn.unflatten(-1, (joints, axes))


class TritonEngine(ModuleEngine):
    """A module and the Triton step, replayed as a CUDA graph; it has no gradient.

    Args:
        network: A ``FusedNetwork``, or any other module.
        noise_backend: What draws the initial noise; None takes the fastest that there is.
    """

    backend: Backend = "triton"
    network: nn.Module

    def __init__(self, network: nn.Module, noise_backend: Backend | None = None) -> None:
        super().__init__(network, noise_backend)
        if isinstance(network, FusedNetwork):
            self.precision = network.precision

    def check(self, request: SampleRequest) -> None:
        """Raise ValueError unless the timesteps are among those that a ``FusedNetwork`` has tabulated."""
        last = int(request.table.timesteps.max(initial=0))
        if isinstance(self.network, FusedNetwork) and last >= self.network.num_timesteps:
            raise ValueError(f"table must have timesteps below {self.network.num_timesteps}, got {last}")

    def sample(self, request: SampleRequest) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        return captured_loop.sample(self.network, request, self._noise(request, INITIAL_NOISE_STEP))


def module_engine(network: Network, condition: Tensor, backend: Backend | None) -> Engine:
    """Return the engine that runs a network as it is.

    Args:
        network: A module, or for the backend ``"torch"`` any function.
        condition: Of the shape's device and type; a gradient that it needs is one that Triton does not have.
        backend: ``"torch"``, ``"triton"``, ``"auto"`` or None.

    Raises:
        BackendUnavailableError: If the named backend cannot run it.
    """
    unfit = {} if (reason := _why_not_triton(network, condition)) is None else {"triton": reason}
    chosen = choose_backend(backend, condition.device, ("torch", "triton"), unfit=unfit)
    noise_backend = backend if chosen == backend else None
    if chosen == "triton":
        assert isinstance(network, nn.Module)
        return TritonEngine(network, noise_backend)
    return ModuleEngine(network, noise_backend)


def _why_not_triton(network: Network, condition: Tensor) -> str | None:
    if condition.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton steps take float32, float16 and bfloat16, got {condition.dtype}"
    if not isinstance(network, nn.Module):  # whether a function has a gradient is unknown
        return f"the Triton steps take a torch.nn.Module, got {type(network).__name__}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (condition, *network.parameters())):
        return "the Triton steps have no gradient"
    return None
