"""Single ops by each backend, beside the same in plain PyTorch: ``pytest benchmarks/bench_ops.py --benchmark-only``."""

from benchmarks.workloads.op_cases import cases  # noqa: F401  (the rows)


def bench_op(time_row, case, variant):
    time_row(case, variant)


def is_default(name: str, variant: str) -> bool:
    """Return whether a row is among the default ones: compiled only what training is compared with."""
    return not variant.startswith("compile") or name == "modulated_graph_conv 1024x17x384x384 fp32 forward and backward"
