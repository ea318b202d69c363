"""The single ops, each in every backend of our own and in plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.case import Case, backends, tensors_of
from benchmarks.workloads.measure import Call, copies_needed
from diffupose import ops, reference
from diffupose.testing import make_inputs, shape_id

Inputs = Callable[[], list[Sequence[Any]]]
# What is timed on a GPU, which it fills, and on a CPU; what shows whether the code runs.
GRAPH_CONVS = {
    "gpu": [(8192, 17, 384, 384)], "cpu": [(128, 17, 128, 128), (1024, 17, 384, 384)], "tiny": [(16, 17, 24, 40)]
}  # fmt: skip
TRAINING = GRAPH_CONVS | {"gpu": [(1024, 17, 384, 384)]}
STEPS = {"gpu": [(65536, 16, 17, 3)], "cpu": [(1, 10, 17, 3), (1024, 10, 17, 3)], "tiny": [(2, 8, 17, 3)]}
WIDE_STEPS = {"gpu": [(65536, 16, 17, 5)], "cpu": [(1024, 10, 17, 5)], "tiny": [(2, 8, 17, 5)]}
STATISTICS = {
    "gpu": [(100_000, 10, 17), (8192, 100, 17)], "cpu": [(1, 10, 17), (1024, 50, 17)], "tiny": [(3, 7, 17)]
}  # fmt: skip
NOISE = {"gpu": [(16384, 50, 51)], "cpu": [(1, 10, 51), (1024, 10, 51)], "tiny": [(3, 5, 51)]}


def cases(device: torch.device, size: str, ours: Sequence[str] | None = None) -> Iterator[Case]:
    """Return the cases of a size, in some backends of our own or in all of the device."""
    maker = _Maker(device, backends(device) if ours is None else ours)
    dtypes = (torch.float32, torch.bfloat16) if size != "cpu" else (torch.float32,)
    for shape in GRAPH_CONVS[size]:
        yield from (maker.graph_conv(shape, dtype) for dtype in dtypes)
    for shape in TRAINING[size]:
        yield from (maker.training(shape, autocast) for autocast in (False, True))
    for shape in STEPS[size]:
        yield from (maker.reverse_step(shape, dtype, drawn) for dtype in dtypes for drawn in (False, True))
    yield from (maker.reverse_step(shape, torch.float32, False) for shape in WIDE_STEPS[size])
    for shape in STATISTICS[size]:
        yield from (maker.hypothesis_statistics(shape, view) for view in (False, True))
    yield from (maker.philox_normal(shape) for shape in NOISE[size])


def statistics_with_view(shape: tuple[int, ...], device: torch.device) -> Case:
    """Return the statistics with a view, alone."""
    return _Maker(device, backends(device)).hypothesis_statistics(shape, True)


def inference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that builds no graph for gradients."""

    def call(*arguments: Any) -> Any:
        with torch.no_grad():
            return function(*arguments)

    return call


class _Maker:
    """Makes cases for a device.

    Args:
        device: Where they run.
        ours: The backends of our own, which come first.
    """

    def __init__(self, device: torch.device, ours: Sequence[str]) -> None:
        self.device, self.ours = device, ours

    def _inputs(self, make: Callable[[], Sequence[Any]], out_bytes: int = 0) -> Inputs:
        """Return what makes, once for all variants, as many sets of inputs, or results, as caches cannot hold."""

        @cache
        def sets() -> list[Sequence[Any]]:
            torch.manual_seed(0)
            with self.device:  # random numbers are made there, not copied
                first = make()
                size = sum(value.numel() * value.element_size() for value in first if isinstance(value, Tensor))
                return [first, *(make() for _ in range(copies_needed(size + out_bytes, self.device) - 1))]

        return sets

    def _variants(
        self,
        op: Callable[..., Any],
        plain: Callable[..., Any],
        inputs: Inputs,
        suffix: str = "",
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = inference,
    ) -> dict[str, Callable[[], Sequence[Call]]]:
        """Return a public op under each backend, ours first, and the same in plain PyTorch, eager and compiled."""

        def calls(name: str) -> Sequence[Call]:
            if name == "compile":
                function = torch.compile(plain, dynamic=False)
            else:
                function = plain if name == "eager" else partial(op, backend=name)
            wrapped = wrap(function)
            return [partial(wrapped, *values) for values in inputs()]

        return {name + suffix: partial(calls, name) for name in (*self.ours, "eager", "compile")}

    def graph_conv(self, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
        """Return the forward pass; its epilogue is what follows the product, by the profiler."""
        poses, joints, c_in, c_out = shape
        inputs = self._inputs(partial(make_inputs, "modulated_graph_conv", shape, dtype=dtype, device=self.device))

        def truth() -> list[Tensor]:
            x, *others = inputs()[0]
            return [reference.modulated_graph_conv(*(value.double() for value in (x[:64], *others)))]

        return Case(
            f"modulated_graph_conv {shape_id(shape)} {shape_id(dtype)}",
            self._variants(ops.modulated_graph_conv, reference.modulated_graph_conv, inputs, _suffix(dtype)),
            truth,
            flops=4 * poses * joints * c_in * c_out,
            kernel=("graph_conv", 3 * poses * joints * c_out * dtype.itemsize),
            in_graph=True,
        )

    def training(self, shape: tuple[int, ...], autocast: bool) -> Case:
        """Return forward and backward pass with every gradient."""
        poses, joints, c_in, c_out = shape
        inputs = self._inputs(
            partial(make_inputs, "modulated_graph_conv", shape, device=self.device, requires_grad=True)
        )

        def gradients(function: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                out = function(*values)
            return torch.autograd.grad(out, values, torch.ones_like(out))

        def truth() -> list[Tensor]:
            doubles = [value.detach().double().requires_grad_() for value in inputs()[0]]
            out = reference.modulated_graph_conv(*doubles)
            return list(torch.autograd.grad(out, doubles, torch.ones_like(out)))

        plain, suffix = reference.modulated_graph_conv, "-bf16" if autocast else ""
        return Case(
            f"modulated_graph_conv {shape_id(shape)} {'autocast' if autocast else 'fp32'} forward and backward",
            self._variants(
                ops.modulated_graph_conv, plain, inputs, suffix, lambda function: partial(gradients, function)
            ),
            truth,
            flops=3 * 4 * poses * joints * c_in * c_out,
        )

    def reverse_step(self, shape: tuple[int, ...], dtype: torch.dtype, drawn: bool) -> Case:
        """Return one step with every term, deterministic or with noise drawn inside.

        Ours reads its row on the device, as a captured loop does. PyTorch's has it as numbers, which it can compile,
        and draws noise by its own generator.
        """

        def make() -> Sequence[Any]:
            made = make_inputs("reverse_step", shape, dtype=dtype, device=self.device)
            sample, output, table, step, x0_last, _, _ = made
            table = table.float()
            if not drawn:
                table[:, 5] = 0.0
            ids = torch.arange(shape[0], device=self.device), torch.arange(shape[1], device=self.device)
            return sample, output, table, torch.tensor([step], device=self.device), x0_last, *ids

        def op(sample: Tensor, output: Tensor, table: Tensor, step: Tensor, x0_last: Tensor, frames: Tensor,
               hypotheses: Tensor, *, backend: str) -> Any:  # fmt: skip
            return ops.reverse_step(
                sample, output, table, step, x0_last=x0_last, frame_ids=frames, hypothesis_ids=hypotheses,
                backend=backend,
            )  # fmt: skip

        p, q, c_x, c_0, c_1, s = make_inputs("reverse_step", (1, 1, 1))[2][1].tolist()

        def plain(sample: Tensor, output: Tensor, table: Tensor, step: Tensor, x0_last: Tensor, *ids: Tensor) -> Any:
            x0 = p * sample + q * output[..., :3]
            previous = c_x * sample + c_0 * x0 + c_1 * x0_last
            return (previous + s * torch.randn_like(sample) if drawn else previous), x0

        def truth() -> list[Tensor]:
            sample, output, table, step, x0_last, frames, hypotheses = inputs()[0]
            few = (value[:16].double() for value in (sample, output, x0_last))
            sample, output, x0_last = few
            return list(op(sample, output, table, step, x0_last, frames[:16], hypotheses, backend="torch"))

        inputs = self._inputs(make)
        joints = shape[0] * shape[1] * shape[2]
        return Case(
            f"reverse_step {shape_id(shape)} {shape_id(dtype)} {'drawn' if drawn else 'deterministic'}",
            self._variants(op, plain, inputs, _suffix(dtype)),
            truth,
            # x_t, output, x0_last; x_prev and x0. Of an output of five channels three are read, but memory is read in
            # sectors of 32 bytes, which is all of it.
            bytes=dtype.itemsize * joints * (3 + shape[3] + 3 + 3 + 3),
            in_graph=True,
            other_noise=("eager", "compile") if drawn else (),
        )

    def hypothesis_statistics(self, shape: tuple[int, ...], view: bool) -> Case:
        """Return mean and covariance, and with a view the mean weighted by reprojection."""

        def op(hypotheses: Tensor, *seen: Tensor, backend: str) -> Any:
            options = zip(("keypoints_2d", "confidence", "intrinsics"), seen, strict=False)
            return ops.hypothesis_statistics(hypotheses, **dict(options), backend=backend)

        def plain(hypotheses: Tensor, *seen: Tensor) -> Any:
            results = reference.hypothesis_statistics(hypotheses, *(seen or (None, None, None)))
            return results if seen else results[:2]

        def truth() -> list[Tensor]:
            return tensors_of(op(*(value[:16].double() for value in inputs()[0]), backend="torch"))

        used = 4 if view else 1
        inputs = self._inputs(lambda: make_inputs("hypothesis_statistics", shape, device=self.device)[:used])
        variants = self._variants(op, plain, inputs)
        if view:
            variants.pop("cuda", None)  # the kernel has mean and covariance only
        frames, hypotheses, joints = shape
        return Case(
            f"hypothesis_statistics {shape_id(shape)} {'view' if view else 'moments'}",
            variants,
            truth,
            # Hypotheses, mean and covariance; keypoints, confidence and intrinsics, weights and the weighted mean.
            bytes=4 * frames * (hypotheses * joints * 3 + joints * 12 + view * (joints * 6 + 9 + hypotheses)),
            in_graph=True,
        )

    def philox_normal(self, shape: tuple[int, ...]) -> Case:
        """Return noise alone."""
        num_bytes = 4 * shape[0] * shape[1] * shape[2]
        inputs = self._inputs(partial(make_inputs, "philox_normal", shape, device=self.device), num_bytes)

        def truth() -> list[Tensor]:
            seed, frames, *others = inputs()[0]
            return [reference.philox_normal(seed, frames[:16], *others)]

        return Case(
            f"philox_normal {shape_id(shape)}",
            self._variants(ops.philox_normal, reference.philox_normal, inputs),
            truth,
            bytes=num_bytes,
            in_graph=True,
        )


def _suffix(dtype: torch.dtype) -> str:
    return "-bf16" if dtype == torch.bfloat16 else ""
