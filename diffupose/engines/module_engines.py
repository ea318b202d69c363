"""A module as an engine: run step by step by PyTorch, or in a captured loop with the Triton step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffupose.engines import captured_loop
from diffupose.engines.engine import Engine
from diffupose.engines.triton_network import FusedNetwork
from diffupose.ops._backend import Backend, choose_backend
from diffupose.ops.philox_normal import philox_normal
from diffupose.reference.philox_normal import INITIAL_NOISE_STEP
from diffupose.reference.sample import sample as reference_sample
from diffupose.schedule import StepTable

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
        self.network, self._noise = network, partial(philox_normal, backend=noise_backend)

    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output; see ``Engine.denoise``."""
        return self.network(sample, condition, timesteps)

    def sample(
        self,
        condition: Tensor,
        table: StepTable,
        seed: int,
        frame_ids: Tensor,
        hypothesis_ids: Tensor,
        clip_sample_range: float | None,
    ) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        scale = table.noise_scale_tensor()
        return reference_sample(
            self.network,  # type: ignore[arg-type]
            condition,
            table.tensor(),
            torch.from_numpy(table.timesteps).to(condition.device),
            seed,
            frame_ids,
            hypothesis_ids,
            clip_sample_range,
            None if scale is None else scale.to(condition.device),
            self._noise,
        )


class TritonEngine(Engine):
    """A module and the Triton step, replayed as a CUDA graph; it has no gradient.

    Args:
        network: A ``FusedNetwork``, or any other module.
        noise_backend: What draws the initial noise; None takes the fastest that there is.
    """

    backend: Backend = "triton"

    def __init__(self, network: nn.Module, noise_backend: Backend | None = None) -> None:
        self.network, self._noise = network, partial(philox_normal, backend=noise_backend)
        if isinstance(network, FusedNetwork):
            self.precision = network.precision

    def check(self, condition: Tensor, table: StepTable) -> None:
        """Raise ValueError unless the timesteps are among those that a ``FusedNetwork`` has tabulated."""
        last = int(table.timesteps.max(initial=0))
        if isinstance(self.network, FusedNetwork) and last >= self.network.num_timesteps:
            raise ValueError(f"table must have timesteps below {self.network.num_timesteps}, got {last}")

    def denoise(self, sample: Tensor, condition: Tensor, timesteps: Tensor) -> Tensor:
        """Return the network's output; see ``Engine.denoise``."""
        return self.network(sample, condition, timesteps)

    def sample(
        self,
        condition: Tensor,
        table: StepTable,
        seed: int,
        frame_ids: Tensor,
        hypothesis_ids: Tensor,
        clip_sample_range: float | None,
    ) -> Tensor:
        """Return samples ``[B, H, J, 3]``; see ``Engine.sample``."""
        joints = condition.shape[1]
        initial = self._noise(seed, frame_ids, hypothesis_ids, INITIAL_NOISE_STEP, 3 * joints)
        return captured_loop.sample(
            self.network, condition, initial.unflatten(-1, (joints, 3)), table, seed, frame_ids, hypothesis_ids,
            clip_sample_range,
        )  # fmt: skip


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
