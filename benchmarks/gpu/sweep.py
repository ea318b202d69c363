"""What the constants of a Triton kernel are chosen by: its times with others, one at a time.

    python -m benchmarks.gpu.sweep --out FOLDER

No stage of ``check.sh``: whoever changes ``kernels/hypothesis_statistics.py`` on a GPU runs it and reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import rates
from benchmarks.gpu.benchmarks import row_of
from benchmarks.gpu.record import Record, Skip, arguments_of, run_stage
from benchmarks.workloads import op_cases
from diffupose.ops import available_backends

OTHERS = {
    "_PREFETCHED": (0, 1, 2, 4, 6),
    "_JOINTS_PER_THREAD": (3, 9),
    "_HYPOTHESES": (8, 16, 64),
    "_REGISTERS": (128, 168),
}


def settings(now: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yield the constants as they are now, then with each of the others in turn."""
    yield now
    for name, values in OTHERS.items():
        for value in values:
            if value != now[name]:
                yield now | {name: value}


def body(record: Record, arguments: Any) -> None:
    """Time the statistics with a view."""
    device = torch.device(arguments.device)
    possible, reason = available_backends()["triton"]
    if not possible:
        raise Skip(reason)
    from diffupose.kernels import hypothesis_statistics as module

    rates.body(record, arguments)
    measured = rates.by_name(record.content["rows"])
    small = device.type != "cuda"
    now = {name: getattr(module, name) for name in OTHERS}
    for frames, hypotheses in ((4, 5), (2, 70)) if small else ((100_000, 10), (8192, 100), (8192, 32), (2048, 400)):
        case = op_cases.statistics_with_view((frames, hypotheses, 17), device)
        for constants in settings(now):
            with mock.patch.multiple(module, **constants):
                record.add(case=case.name, **constants, **row_of(case, "triton", device, measured))
        case.forget()


if __name__ == "__main__":
    sys.exit(run_stage("sweep", arguments_of(__doc__), body))
