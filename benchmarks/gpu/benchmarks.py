"""Stage ``benchmarks``: our ops and the whole reverse process beside PyTorch, eager and compiled.

A time is taken of a right result only; each row says how far it is from a floor: bytes over the copy rate, or
operations over the product rate of the precision, both measured by stage ``rates`` in the same call.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu import rates
from benchmarks.gpu.record import Record, arguments_of, run_stage
from benchmarks.workloads import op_cases, sample_cases
from benchmarks.workloads.case import Case
from benchmarks.workloads.measure import Call, captured, kernel_microseconds, milliseconds
from diffupose.errors import BackendUnavailableError


def body(record: Record, arguments: Any) -> None:
    """Time everything."""
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("highest")
    measured = rates.measured(arguments.out, record.content["machine"])
    if not measured:
        rates.body(record, arguments)
        measured = rates.by_name(record.content["rows"])
    size = "gpu" if device.type == "cuda" else "tiny"  # which shows whether the code runs, and no more
    # What matters most comes first; what torch.compile makes, which takes its time, last, but for one pose.
    for compiled in (False,) if arguments.no_compile else (False, True):
        for case in cases(device, size, compiled):
            for variant in case.variants:
                late = variant.startswith("compile") and not ("B=1," in case.name and "paper" in case.name)
                if late != compiled or (arguments.no_compile and variant.startswith("compile")):
                    continue
                if re.search(arguments.cases, f"{case.name} {variant}"):
                    record.add(case=case.name, variant=variant, **row_of(case, variant, device, measured))
            case.forget()


def cases(device: torch.device, size: str, compiled: bool) -> Iterator[Case]:
    """Return all cases: the paper's network, the ops, whole lifts, the bundled network; if compiled, ops first."""
    samples, ops = list(sample_cases.cases(device, size)), op_cases.cases(device, size)
    if compiled:  # the passes of training before all others
        return itertools.chain(sorted(ops, key=lambda case: "backward" not in case.name), samples)
    first = [case for case in samples if "paper" in case.name]
    last = [case for case in samples if "paper" not in case.name]
    crossover = sample_cases.crossover(device) if size == "gpu" else []
    return itertools.chain(first, ops, sample_cases.lifts(device, size), last, crossover)


def row_of(case: Case, variant: str, device: torch.device, measured: dict[str, float]) -> dict[str, Any]:
    """Check a variant and time it; one that cannot run says why."""
    on_gpu = device.type == "cuda"
    try:
        calls = case.variants[variant]()
        row: dict[str, Any] = {"error": case.error(variant, calls[0]()), "limit": case.limit(variant)}
        if not row["error"] <= row["limit"]:  # NaN is not
            return row | {"ok": False}
        row |= times_of(case, calls, device) if on_gpu else milliseconds(calls, device, seconds=0.05, least=2)
        if case.kernel and on_gpu:
            row |= kernels(calls[0], case.kernel, measured["copy"])
    except BackendUnavailableError as reason:
        return {"not_run": str(reason)[:300]}
    except Exception as reason:  # the others go on
        return {"ok": False, "failed": f"{type(reason).__name__}: {reason}"[:500]}
    seconds, precision = 1e-3 * row["milliseconds"], case.precision_of(variant)
    if case.bytes:
        row |= {"bytes": case.bytes, "of_copy_rate": case.bytes / measured["copy"] / seconds}
    if case.flops:
        row |= {"flops": case.flops, "of": precision, "of_product_rate": case.flops / measured[precision] / seconds}
    return row


def times_of(case: Case, calls: Sequence[Call], device: torch.device) -> dict[str, Any]:
    """Return the times of one call on a GPU."""
    replay = captured(calls) if case.in_graph else None
    if replay is None:
        times = milliseconds(calls, device, seconds=case.seconds, least=case.least)
        return times | ({"in_graph": False} if case.in_graph else {})
    times = milliseconds([replay], device, seconds=case.seconds, least=case.least)
    each = {key: value / len(calls) for key, value in times.items() if isinstance(value, float)}
    return times | each | {"calls_a_time": len(calls) * times["calls_a_time"], "in_graph": True}


def kernels(call: Call, kernel: tuple[str, int], copy_rate: float) -> dict[str, Any]:
    """Return the time of the kernels of a name, and what they reach of the copy rate."""
    name, num_bytes = kernel
    times = kernel_microseconds(call)
    ours = sum(time for key, time in times.items() if name in key)
    found: dict[str, Any] = {"kernels": {key[:80]: time for key, time in times.items()}}
    if ours > 0:
        found |= {"kernel_microseconds": ours, "kernel_of_copy_rate": num_bytes / copy_rate / (1e-6 * ours)}
    return found


if __name__ == "__main__":
    sys.exit(run_stage("benchmarks", arguments_of(__doc__), body))
