"""The single ops, each in plain PyTorch, compiled, and in every backend of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.every_op import backends
from benchmarks.workloads.case import Case
from benchmarks.workloads.measure import Call, copies_needed
from diffupose import ops, reference
from diffupose.testing import make_inputs, shape_id

JOINTS = 17


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Return the cases of a device, at sizes that fill it or, to try the code, at small ones."""
    for dtype in (torch.float32, torch.bfloat16):
        yield graph_conv((8 if small else 8192, JOINTS, *((16, 24) if small else (384, 384))), dtype, device)
    for autocast in (False, True):
        yield training((8 if small else 1024, JOINTS, *((16, 24) if small else (384, 384))), autocast, device)
    for dtype in (torch.float32, torch.bfloat16):
        for drawn in (False, True):
            yield reverse_step((4, 3, JOINTS, 3) if small else (65536, 16, JOINTS, 3), dtype, drawn, device)
    yield reverse_step((4, 3, JOINTS, 5) if small else (65536, 16, JOINTS, 5), torch.float32, False, device)
    for frames, hypotheses in ((4, 5),) if small else ((100_000, 10), (8192, 100)):
        for view in (False, True):
            yield hypothesis_statistics((frames, hypotheses, JOINTS), view, device)
    yield philox_normal((4, 5, 51) if small else (16384, 50, 51), device)


def size_of(values: Any) -> int:
    """Return the bytes of the tensors among some values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


Inputs = Callable[[], list[Sequence[Any]]]


def inputs_of(make: Callable[[], Sequence[Any]], device: torch.device, out_bytes: int = 0) -> Inputs:
    """Return what makes, once for all variants, as many sets of inputs, or results, as the caches cannot hold."""

    @cache
    def sets() -> list[Sequence[Any]]:
        torch.manual_seed(0)
        with device:  # random numbers are made there, not copied
            first = make()
            return [first, *(make() for _ in range(copies_needed(size_of(first) + out_bytes, device) - 1))]

    return sets


def called(function: Callable[..., Any], inputs: Inputs) -> Sequence[Call]:
    """Return calls of a function, one on each set."""
    return [partial(function, *values) for values in inputs()]


def variants(
    function: Callable[..., Any], plain: Callable[..., Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Return a public op under each backend, ours first, and the same in plain PyTorch, eager and compiled."""
    ours = {name: partial(function, backend=name) for name in backends(device)}
    return ours | {"eager": plain, "compile": torch.compile(plain, dynamic=False)}


def graph_conv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Return the forward pass; its epilogue is what follows the product, by the profiler."""
    poses, joints, c_in, c_out = shape
    inputs = inputs_of(partial(make_inputs, "modulated_graph_conv", shape, dtype=dtype, device=device), device)
    suffix = "-bf16" if dtype == torch.bfloat16 else ""

    def truth() -> list[Tensor]:
        x, *others = inputs()[0]
        return [reference.modulated_graph_conv(*(value.double() for value in (x[:64], *others)))]

    named = variants(inference(ops.modulated_graph_conv), inference(reference.modulated_graph_conv), device)
    return Case(
        f"modulated_graph_conv {shape_id(shape)} {shape_id(dtype)}",
        {name + suffix: partial(called, call, inputs) for name, call in named.items()},
        truth,
        flops=4 * poses * joints * c_in * c_out,
        kernel=("graph_conv", 3 * poses * joints * c_out * dtype.itemsize),
        in_graph=True,
    )


def training(shape: tuple[int, ...], autocast: bool, device: torch.device) -> Case:
    """Return forward and backward pass with every gradient."""
    poses, joints, c_in, c_out = shape
    inputs = inputs_of(partial(make_inputs, "modulated_graph_conv", shape, device=device, requires_grad=True), device)
    suffix = "-bf16" if autocast else ""

    def step(call: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = call(*values)
        return torch.autograd.grad(out, values, torch.ones_like(out))

    def truth() -> list[Tensor]:
        doubles = [value.detach().double().requires_grad_() for value in inputs()[0]]
        out = reference.modulated_graph_conv(*doubles)
        return list(torch.autograd.grad(out, doubles, torch.ones_like(out)))

    named = variants(ops.modulated_graph_conv, reference.modulated_graph_conv, device)
    return Case(
        f"modulated_graph_conv {shape_id(shape)} {'autocast' if autocast else 'fp32'} forward and backward",
        {name + suffix: partial(called, partial(step, call), inputs) for name, call in named.items()},
        truth,
        flops=3 * 4 * poses * joints * c_in * c_out,
    )


def reverse_step(shape: tuple[int, ...], dtype: torch.dtype, drawn: bool, device: torch.device) -> Case:
    """Return one step with every term, deterministic or with noise drawn inside.

    Ours reads its row on the device, as a captured loop does; PyTorch's has it as numbers, which it can compile, and
    draws noise by its own generator.
    """

    def make() -> Sequence[Any]:
        sample, output, table, step, x0_last, _, _ = make_inputs("reverse_step", shape, dtype=dtype, device=device)
        table = table.float()
        if not drawn:
            table[:, 5] = 0.0
        ids = torch.arange(shape[0], device=device), torch.arange(shape[1], device=device)
        return sample, output, table, torch.tensor([step], device=device), x0_last, *ids

    def call(sample: Tensor, output: Tensor, table: Tensor, step: Tensor, x0_last: Tensor, frames: Tensor,
             hypotheses: Tensor, backend: str) -> Any:  # fmt: skip
        return ops.reverse_step(
            sample, output, table, step, x0_last=x0_last, frame_ids=frames, hypothesis_ids=hypotheses, backend=backend
        )

    p, q, c_x, c_0, c_1, s = make_inputs("reverse_step", (1, 1, 1))[2][1].tolist()

    def plain(sample: Tensor, output: Tensor, table: Tensor, step: Tensor, x0_last: Tensor, *ids: Tensor) -> Any:
        x0 = p * sample + q * output[..., :3]
        previous = c_x * sample + c_0 * x0 + c_1 * x0_last
        return (previous + s * torch.randn_like(sample) if drawn else previous), x0

    def truth() -> list[Tensor]:
        sample, output, table, step, x0_last, frames, hypotheses = inputs()[0]
        few = [value[:16] for value in (sample.double(), output.double(), x0_last.double(), frames)]
        return list(call(few[0], few[1], table, step, few[2], few[3], hypotheses, "torch"))

    inputs = inputs_of(make, device)
    poses = shape[0] * shape[1] * shape[2]
    suffix = "-bf16" if dtype == torch.bfloat16 else ""
    named = variants(inference(call), inference(plain), device)
    return Case(
        f"reverse_step {shape_id(shape)} {shape_id(dtype)} {'drawn' if drawn else 'deterministic'}",
        {name + suffix: partial(called, f, inputs) for name, f in named.items()},
        truth,
        # x_t, the three channels of the output that are read, x0_last; x_prev and x0. Of wider outputs whole sectors of
        # 32 bytes are read, which is all of them.
        bytes=dtype.itemsize * poses * (3 + shape[3] + 3 + 3 + 3),
        in_graph=True,
        other_noise=("eager", "compile") if drawn else (),
    )


def hypothesis_statistics(shape: tuple[int, ...], view: bool, device: torch.device) -> Case:
    """Return mean and covariance, and with a view the mean weighted by reprojection."""

    def make() -> Sequence[Any]:
        inputs = make_inputs("hypothesis_statistics", shape, device=device)
        return inputs if view else inputs[:1]

    def call(hypotheses: Tensor, *seen: Tensor, backend: str) -> Any:
        names = ("keypoints_2d", "confidence", "intrinsics")
        return ops.hypothesis_statistics(hypotheses, **dict(zip(names, seen, strict=False)), backend=backend)

    def plain(hypotheses: Tensor, *seen: Tensor) -> Any:
        results = reference.hypothesis_statistics(hypotheses, *(seen or (None, None, None)))
        return results if seen else results[:2]

    def truth() -> list[Tensor]:
        return [value for value in call(*(value[:16].double() for value in inputs()[0]), backend="torch")
                if value is not None]  # fmt: skip

    inputs = inputs_of(make, device)
    frames, hypotheses, joints = shape
    named = variants(inference(call), inference(plain), device)
    return Case(
        f"hypothesis_statistics {shape_id(shape)} {'view' if view else 'moments'}",
        {name: partial(called, f, inputs) for name, f in named.items()},
        truth,
        # Hypotheses, mean and covariance; keypoints, confidence and intrinsics, weights and the weighted mean.
        bytes=4 * frames * (hypotheses * joints * 3 + joints * 12 + view * (joints * 6 + 9 + hypotheses)),
        in_graph=True,
    )


def philox_normal(shape: tuple[int, ...], device: torch.device) -> Case:
    """Return noise alone."""

    num_bytes = 4 * shape[0] * shape[1] * shape[2]
    inputs = inputs_of(partial(make_inputs, "philox_normal", shape, device=device), device, num_bytes)

    def truth() -> list[Tensor]:
        seed, frames, hypotheses, step, count = inputs()[0]
        return [reference.philox_normal(seed, frames[:16], hypotheses, step, count)]

    named = variants(inference(ops.philox_normal), inference(reference.philox_normal), device)
    return Case(
        f"philox_normal {shape_id(shape)}",
        {name: partial(called, f, inputs) for name, f in named.items()},
        truth,
        bytes=num_bytes,
        in_graph=True,
    )


def inference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that builds no graph for gradients."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return function(*arguments, **keywords)

    return call
