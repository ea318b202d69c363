"""What users feel: a whole lift with the bundled model, from keypoints to hypotheses."""

from benchmarks.workloads.sample_cases import lifts as cases  # noqa: F401  (the rows)


def bench_lift(time_row, case, variant):
    time_row(case, variant)


def is_default(name: str, variant: str) -> bool:
    """Return whether a row is among the default ones."""
    return "N=10" in name
