"""The whole reverse process, by our engines and by the loop in PyTorch; and the whole lift around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.workloads.case import Case, backends
from benchmarks.workloads.measure import Call
from benchmarks.workloads.networks import Chains, fused_network, network
from diffupose import Lifter

# Model, frames, hypotheses of each, steps.
SIZES = {
    "gpu": [("paper-384", 1, 10, 100), ("paper-384", 1024, 16, 100), ("mocap", 1, 10, 5), ("mocap", 1024, 16, 5)],
    "cpu": [
        (model, frames, hypotheses, steps)
        for model, few, many in (("paper-384", 100, 10), ("paper-256", 100, 10), ("mocap", 5, 5))
        for frames, steps in ((1, few), (32, many))
        for hypotheses in (1, 10, 50)
    ],
    "tiny": [("paper-64", 1, 2, 2), ("base-64", 2, 1, 1)],
}  # fmt: skip
# Frames, hypotheses of each, steps: None for the model's own.
LIFTS: dict[str, list[tuple[int, int, int | None]]] = {
    "gpu": [(1, 10, None), (1024, 10, None)],
    "cpu": [(1, 1, None), (1, 10, None), (1, 50, None), (32, 10, None)],
    "tiny": [(1, 2, 1)],
}
# By backend: precision and mode of each engine.
ENGINES: dict[str, dict[str, tuple[str, str | None]]] = {
    "cuda": {
        "cluster-bf16": ("bfloat16", "cluster"),
        "layers-bf16": ("bfloat16", "layers"),
        "persistent-bf16": ("bfloat16", "persistent"),
        "layers-fp32": ("float32", "layers"),
    },
    "cpp": {"cpp-bf16": ("bfloat16", None), "cpp-fp32": ("float32", None)},
}
MANY = 1000  # chains, of which only what is meant for many is timed on a GPU
Variants = dict[str, Callable[[], Sequence[Call]]]


def has_clusters(device: torch.device) -> bool:
    """Return whether a device has clusters of thread blocks; emulated, the CPU has."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """Return the cases of a size."""
    return (case(Chains(*numbers, device)) for numbers in SIZES[size])


def case(chains: Chains) -> Case:
    """Return one size; ours first, so that what is cut off are the others."""
    device, few = chains.device, chains.count <= MANY or chains.device.type == "cpu"

    def by_pytorch(autocast: bool) -> Sequence[Call]:
        return [chains.by_pytorch(network(chains.model, device), autocast)]

    def by_triton(precision: str | None) -> Sequence[Call]:
        fused = fused_network(chains.model, precision, device) if precision else network(chains.model, device)
        return [chains.by_triton(fused)]

    def compiled(autocast: bool, mode: str | None) -> Sequence[Call]:
        torch._dynamo.reset()
        net = torch.compile(network(chains.model, device), dynamic=False, mode=mode)
        return [chains.by_pytorch(net, autocast)]

    def truth() -> list[Tensor]:
        # A frame's numbers do not depend on the others.
        first = Chains(chains.model, min(chains.frames, 8), chains.hypotheses, chains.steps, device)
        result = first.by_pytorch(network(chains.model, device), False)()
        clipped = 0.0 if chains.clip is None else float((result.abs() >= chains.clip).float().mean())
        assert clipped < 0.2, "clipped numbers are right whatever the network does"
        return [result]

    variants: Variants = {
        name: lambda backend=backend, how=how: [chains.by_engine(backend, *how)]
        for backend in backends(device)
        for name, how in ENGINES.get(backend, {}).items()
        if (few or name in ("layers-bf16", "persistent-bf16")) and (how[1] != "cluster" or has_clusters(device))
    }
    if "triton" in backends(device):
        variants["triton-bf16"] = partial(by_triton, "bfloat16")
        if few:
            variants |= {"triton-fp32": partial(by_triton, "float32"), "triton-module-fp32": partial(by_triton, None)}
    variants["eager-bf16"] = partial(by_pytorch, True)
    if device.type == "cuda":
        variants["compile-bf16"] = partial(compiled, True, None)
        variants["compile-graphs-bf16"] = partial(compiled, True, "reduce-overhead")
    else:
        variants["compile-fp32"] = partial(compiled, False, None)
    if few:
        variants["eager-fp32"] = partial(by_pytorch, False)
    return Case(f"sample {chains}", variants, truth, flops=chains.flops, least=5 if few else 2)


def crossover(device: torch.device) -> Iterator[Case]:
    """Return the cases that show for how many hypotheses which mode of the CUDA engine is the fastest: ten steps."""
    for hypotheses in (1, 5, 10, 16, 20, 32, 64, 128, 256, 512, 1024, 2048):
        whole = case(Chains("paper-384", 1, hypotheses, 10, device))
        names = ["cluster-bf16", "layers-bf16"] if hypotheses <= 128 else []
        names += ["layers-bf16", "persistent-bf16"] if hypotheses >= 32 else []
        whole.variants = {name: whole.variants[name] for name in dict.fromkeys(names) if name in whole.variants}
        whole.seconds = 0.3
        yield whole


def lifts(device: torch.device, size: str) -> Iterator[Case]:
    """Return whole lifts with the bundled model: from keypoints on the host to hypotheses on the device."""
    return (_lift(*numbers, device) for numbers in LIFTS[size])


def _lift(frames: int, hypotheses: int, given: int | None, device: torch.device) -> Case:
    """Return one size: by our backends and by the plain module."""
    keypoints = 500.0 + 100.0 * torch.randn(frames, 17, 2, generator=torch.Generator().manual_seed(0))
    steps = given or _lifter(device).sampling().num_inference_steps

    def lift(backend: str, precision: str, most: int = frames) -> Tensor:
        return _lifter(device)(
            keypoints[:most], image_size=(1000, 1000), num_hypotheses=hypotheses, num_inference_steps=steps,
            backend=backend, precision=precision,
        ).hypotheses  # fmt: skip

    variants: Variants = {
        f"{'eager' if backend == 'torch' else backend}-{short}": lambda how=(backend, precision): [partial(lift, *how)]
        for backend in (*backends(device), "torch")
        for short, precision in (("bf16", "bfloat16"), ("fp32", "float32"))
        if (backend, short) != ("torch", "bf16")
    }
    chains = Chains("mocap", frames, hypotheses, steps, device)
    return Case(f"lift {chains}", variants, lambda: [lift("torch", "float32", min(frames, 8))], flops=chains.flops)


@cache
def _lifter(device: torch.device) -> Lifter:
    return Lifter.from_pretrained(device=str(device))
