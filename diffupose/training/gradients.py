"""Loss and gradients of a batch. A GPU replays a CUDA graph: launching its kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from diffupose.engines.cuda_graph import capture

_WARM_UP = 3  # calls before the capture, in which kernels are loaded and chosen


class Gradients:
    """Computes a loss and leaves its gradients in the parameters.

    Args:
        loss: From tensors to the loss, a scalar; always the same shapes.
        parameters: What the gradients are of.
        as_graph: Whether calls after the first ones replay a CUDA graph, which writes into the same gradient tensors
            each time.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter], as_graph: bool) -> None:
        self._loss, self._parameters, self._as_graph = loss, list(parameters), as_graph
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, ...] = ()
        self._result = torch.empty(())

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the loss of these tensors, without a graph to differentiate."""
        if not self._as_graph:
            return self._compute(tensors)
        self._calls += 1
        if self._calls <= _WARM_UP:
            return self._aside(tensors)
        if self._graph is None:
            self._static = tuple(tensor.clone() for tensor in tensors)
            self._graph = capture(self._keep, self._static[0].device)
        for static, tensor in zip(self._static, tensors, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._result

    def _compute(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss(*tensors)
        loss.backward()
        return loss.detach()

    def _aside(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Compute on a side stream, as a capture does: buffers that PyTorch keeps per stream must not be shared."""
        current = torch.cuda.current_stream(tensors[0].device)
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = self._compute(tensors)
        current.wait_stream(stream)
        # These tensors were made on the side stream and are used on this one.
        for tensor in (loss, *(parameter.grad for parameter in self._parameters)):
            if tensor is not None:
                tensor.record_stream(current)
        return loss

    def _keep(self) -> None:
        self._result = self._compute(self._static)
