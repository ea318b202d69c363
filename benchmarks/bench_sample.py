"""The whole reverse process: PyTorch, eager and compiled, the C++ engine in float32 and bfloat16."""

from benchmarks.workloads.sample_cases import cases  # noqa: F401  (the rows)

DEFAULT = {
    "sample paper-384, B=1, N=1, 100 steps": ("eager-fp32", "cpp-fp32", "cpp-bf16"),
    "sample paper-384, B=1, N=10, 100 steps": ("eager-fp32", "compile-fp32", "cpp-fp32", "cpp-bf16"),
    "sample paper-384, B=32, N=10, 10 steps": ("eager-fp32", "cpp-fp32", "cpp-bf16"),
    "sample mocap, B=1, N=10, 5 steps": ("eager-fp32", "cpp-fp32", "cpp-bf16"),
    "sample mocap, B=32, N=10, 5 steps": ("eager-fp32", "cpp-fp32", "cpp-bf16"),
}


def bench_sample(time_row, case, variant):
    time_row(case, variant)


def is_default(name: str, variant: str) -> bool:
    """Return whether a row is among the default ones."""
    return variant in DEFAULT.get(name, ())
