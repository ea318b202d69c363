"""Stage ``capture``: every op gives the same bits in a CUDA graph, on two streams at once and on a stream of one's own.

On the CPU, to try the code: the same bits when it is called again, and from two threads at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

# cuBLAS gives the same bits on every stream only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor

from benchmarks.gpu.every_op import calls
from benchmarks.gpu.record import Record, Skip, arguments_of, run_stage
from benchmarks.workloads.case import backends, tensors_of
from benchmarks.workloads.measure import Call
from diffupose.engines.engine import SampleRequest
from diffupose.errors import BackendUnavailableError


def body(record: Record, arguments: Any) -> None:
    """Check every op of every backend in every way."""
    device = torch.device(arguments.device)
    found = backends(device)
    if not found:
        raise Skip("none of our backends runs on this device")
    checks = CUDA_CHECKS if device.type == "cuda" else CPU_CHECKS
    for backend in found:
        for name, make in calls(device, backend).items():
            torch.manual_seed(1)
            try:
                call = make()
                expected = copied(call())
            except BackendUnavailableError as error:
                record.add(name=f"{backend} {name}", not_run=str(error)[:300])
                continue
            except Exception as error:  # the others go on
                record.add(name=f"{backend} {name}", ok=False, error=f"{type(error).__name__}: {error}"[:300])
                continue
            results = {}
            for check, run in checks.items():
                if check == "graph" and not capturable(backend, name):
                    continue
                try:
                    results[check] = same(run(call, device), expected)
                except Exception as error:  # likewise
                    results[check] = f"{type(error).__name__}: {error}"[:300]
            record.add(name=f"{backend} {name}", ok=all(value is True for value in results.values()), **results)


def capturable(backend: str, name: str) -> bool:
    """Return whether a call may stand in a graph: Triton's kernel reads the row of a step on the device only."""
    return not (backend == "triton" and "on the host" in name)


def copied(result: Any) -> list[Tensor]:
    """Return the tensors of a result, safe from the next call."""
    return [value.detach().clone() for value in tensors_of(result)]


def same(results: list[list[Tensor]], expected: list[Tensor]) -> bool:
    """Return whether all results are the expected bits."""
    return all(
        len(result) == len(expected)
        and all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(result, expected, strict=True))
        for result in results
    )


def in_graph(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Capture a call and replay it twice over memory that was spoilt in between."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = tensors_of(call())
    replays = []
    for _ in range(2):
        for value in result:
            value.detach().view(torch.uint8).fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize(device)
        replays.append(copied(result))
    return replays


def on_two_streams(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Call on two streams that run at the same time, several times."""
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    results = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append([value.detach() for value in tensors_of(call())])
    torch.cuda.synchronize(device)
    return results


def inputs_of(call: Call) -> list[Tensor]:
    """Return the tensors that a call takes, those of a request among them."""
    assert isinstance(call, partial)
    values = [*call.args, *call.keywords.values()]
    values += [field for value in values if isinstance(value, SampleRequest) for field in vars(value).values()]
    return [value for value in values if isinstance(value, Tensor)]


def behind_others(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Call on a busy stream on which the inputs are yet to come: a kernel on any other stream would read NaN."""
    inputs = [value for value in inputs_of(call) if value.is_cuda and value.is_floating_point()]
    kept = [value.detach().clone() for value in inputs]
    with torch.no_grad():
        for value in inputs:
            value.fill_(torch.nan)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for value, right in zip(inputs, kept, strict=True):
                value.copy_(right)
        result = copied(call())
    torch.cuda.synchronize(device)
    return [result]


def on_last_device(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Call while another GPU is the current one, where there are several."""
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        result = copied(call())
    torch.cuda.synchronize(device)
    return [result]


def again(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Call twice more."""
    return [copied(call()) for _ in range(2)]


def from_two_threads(call: Call, device: torch.device) -> list[list[Tensor]]:
    """Call from two threads at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: copied(call()), range(4)))


Check = Callable[[Call, torch.device], list[list[Tensor]]]
CUDA_CHECKS: dict[str, Check] = {
    "graph": in_graph,
    "two_streams": on_two_streams,
    "own_stream": behind_others,
    "other_current_device": on_last_device,
}
CPU_CHECKS: dict[str, Check] = {"again": again, "two_threads": from_two_threads}


if __name__ == "__main__":
    sys.exit(run_stage("capture", arguments_of(__doc__), body))
