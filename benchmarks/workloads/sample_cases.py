"""The whole reverse process: the loop in PyTorch, eager and compiled, and our engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.every_op import backends, has_clusters
from benchmarks.workloads import networks
from benchmarks.workloads.case import Case
from benchmarks.workloads.measure import Call

# Model, frames, hypotheses of each, steps.
SIZES = (("paper-384", 1, 10, 100), ("paper-384", 1024, 16, 100), ("mocap", 1, 10, 5), ("mocap", 1024, 16, 5))
SMALL = (("paper-64", 1, 3, 2), ("mocap", 2, 3, 2))
# By the kind of device: backend, precision and mode.
ENGINES: dict[str, dict[str, tuple[str, str, str | None]]] = {
    "cuda": {
        "cluster-bf16": ("cuda", "bfloat16", "cluster"),
        "layers-bf16": ("cuda", "bfloat16", "layers"),
        "persistent-bf16": ("cuda", "bfloat16", "persistent"),
        "layers-fp32": ("cuda", "float32", "layers"),
    },
    "cpu": {"cpp-bf16": ("cpp", "bfloat16", None), "cpp-fp32": ("cpp", "float32", None)},
}


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Return the cases of a device."""
    for model, frames, hypotheses, steps in SMALL if small else SIZES:
        yield case(model, frames, hypotheses, steps, device)


def case(model: str, frames: int, hypotheses: int, steps: int, device: torch.device) -> Case:
    """Return one size; ours first, so that what is cut off are the others."""
    sizes: dict[str, Any] = {"frames": frames, "hypotheses": hypotheses, "steps": steps}
    chains = frames * hypotheses

    def engine(backend: str, precision: str, mode: str | None) -> Sequence[Call]:
        return [networks.sampler(model, backend, precision, mode, device, **sizes)]

    def modules(autocast: bool) -> Sequence[Call]:
        return [networks.loop(on_device(model, device), model, device, **sizes, autocast=autocast)]

    def triton(precision: str | None) -> Sequence[Call]:
        fused = on_device(model, device) if precision is None else networks.fused_network(model, precision, device)
        return [networks.triton_loop(fused, model, device, **sizes)]

    def compiled(mode: str | None) -> Sequence[Call]:
        torch._dynamo.reset()
        net = torch.compile(on_device(model, device), dynamic=False, mode=mode)
        return [networks.loop(net, model, device, **sizes, autocast=True)]

    def truth() -> list[Tensor]:
        few = sizes | {"frames": min(frames, 8)}  # a frame's numbers do not depend on the others
        result = networks.loop(on_device(model, device), model, device, **few, autocast=False)()
        clip = networks.clip_of(model)
        clipped = 0.0 if clip is None else float((result.abs() >= clip).float().mean())
        assert clipped < 0.2, "clipped numbers are right whatever the network does"
        return [result]

    variants: dict[str, Callable[[], Sequence[Call]]] = {
        name: partial(engine, *how)
        for name, how in ENGINES.get(device.type, {}).items()
        if chains <= 1000 or name in ("layers-bf16", "persistent-bf16") or device.type == "cpu"
    }
    if not has_clusters(device):
        variants.pop("cluster-bf16", None)
    if "triton" in backends(device):
        variants["triton-bf16"] = partial(triton, "bfloat16")
        if chains <= 1000:
            variants["triton-fp32"] = partial(triton, "float32")
            variants["triton-module-fp32"] = partial(triton, None)
    variants["eager-bf16"] = partial(modules, True)
    variants["compile-bf16"] = partial(compiled, None)
    if device.type == "cuda":
        variants["compile-graphs-bf16"] = partial(compiled, "reduce-overhead")
    if chains <= 1000:
        variants["eager-fp32"] = partial(modules, False)
    return Case(
        f"sample {model}, B={frames}, N={hypotheses}, {steps} steps",
        variants,
        truth,
        flops=networks.flops(model) * chains * steps,
        seconds=1.0,
        least=2 if chains > 1000 else 5,
    )


def crossover(device: torch.device) -> Iterator[Case]:
    """Return what says for how many hypotheses which of the engine's ways is the fastest: ten steps each."""
    for hypotheses in (1, 5, 10, 16, 20, 32, 64, 128, 256, 512, 1024, 2048):
        whole = case("paper-384", 1, hypotheses, 10, device)
        names = ["cluster-bf16", "layers-bf16"] if hypotheses <= 128 else []
        names += ["layers-bf16", "persistent-bf16"] if hypotheses >= 32 else []
        whole.variants = {name: whole.variants[name] for name in dict.fromkeys(names) if name in whole.variants}
        whole.seconds = 0.3
        yield whole


@cache
def on_device(model: str, device: torch.device) -> nn.Module:
    """Return a network on a device."""
    return copy.deepcopy(networks.network(model)).to(device)
