"""Write the tables of ``docs/gpu.md`` from ``benchmarks/results/h200/``.

``python -m benchmarks.gpu.tables [--check]``: with ``--check`` nothing is written, and the exit status is 1 where the
document differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.record import ROOT
from benchmarks.workloads.table import HEADER, floor, markdown, rewrite, times

RESULTS = ROOT / "benchmarks" / "results" / "h200"
FEW, MANY = "sample paper-384, B=1, N=10, 100 steps", "sample paper-384, B=1024, N=16, 100 steps"
GRAPH_CONV, TRAINING = "modulated_graph_conv 8192x17x384x384", "modulated_graph_conv 1024x17x384x384"
STEP, STATISTICS = (
    "reverse_step 65536x16x17x3",
    ("hypothesis_statistics 100000x10x17", "hypothesis_statistics 8192x100x17"),
)


def content_of(name: str) -> dict[str, Any]:
    """Return a file of the results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def reader(name: str) -> Callable[..., float]:
    """Return a function of case, variant and key that reads a number of a file of times."""
    rows = {(row["case"], row["variant"]): row for row in content_of(name)["rows"]}
    return lambda case, variant, key="milliseconds": rows[case, variant][key]


def wanted() -> str:
    """Return the table of what was wanted beside what was measured."""
    cuda, triton = reader("benchmarks"), reader("benchmarks-triton")

    def ratio(of: Callable[..., float], case: str, ours: str, other: str) -> float:
        return of(case, other) / of(case, ours)

    def percent(of: Callable[..., float], case: str, variant: str, key: str = "of_copy_rate") -> str:
        return f"{100 * of(case, variant, key):.0f} %"

    def statistics(of: Callable[..., float], variant: str, what: str) -> str:
        return " and ".join(percent(of, f"{case} {what}", variant) for case in STATISTICS)

    differences = {row["name"]: row.get("difference") for row in content_of("accuracy")["rows"]}
    fp32, autocast = (f"{TRAINING} {mode} forward and backward" for mode in ("fp32", "autocast"))
    plain, drawn = (f"{STEP} fp32 {mode}" for mode in ("deterministic", "drawn"))
    epilogue = "kernel_of_copy_rate"
    rows = [
        ["sampling of one lift, N = 10, B = 1, 100 steps, d = 384, bfloat16", "5 ms",
         f"{cuda(FEW, 'cluster-bf16'):.1f} ms (`cluster`); {cuda(FEW, 'layers-bf16'):.1f} ms (`layers`)"],
        ["the same against the eager loop", "10 times as fast",
         f"{ratio(cuda, FEW, 'cluster-bf16', 'eager-bf16'):.0f} times (eager in bfloat16), "
         f"{ratio(cuda, FEW, 'cluster-bf16', 'eager-fp32'):.0f} times (in float32)"],
        ["the same against `torch.compile` with CUDA graphs", "2 times",
         f"{ratio(cuda, FEW, 'cluster-bf16', 'compile-graphs-bf16'):.1f} times"],
        ["16,384 hypotheses, 100 steps, d = 384, bfloat16", "40 % of the product rate",
         f"{percent(cuda, MANY, 'persistent-bf16', 'of_product_rate')} (`persistent`), "
         f"{ratio(cuda, MANY, 'persistent-bf16', 'eager-bf16'):.1f} times as fast as eager"],
        ["`modulated_graph_conv`, what follows its product", "80 % of the copy rate",
         f"{percent(cuda, f'{GRAPH_CONV} fp32', 'cuda', epilogue)} in float32, "
         f"{percent(cuda, f'{GRAPH_CONV} bf16', 'cuda-bf16', epilogue)} in bfloat16"],
        ["its training step, N = 1024, d = 384, against eager", "1.5 times",
         f"{ratio(cuda, fp32, 'cuda', 'eager'):.2f} in float32, "
         f"{ratio(cuda, autocast, 'cuda-bf16', 'eager-bf16'):.2f} under autocast"],
        ["the same against `torch.compile`", "not slower",
         f"{ratio(cuda, fp32, 'cuda', 'compile'):.2f} and {ratio(cuda, autocast, 'cuda-bf16', 'compile-bf16'):.2f} "
         "times as fast"],
        ["MPJPE of the bundled model in bfloat16, noisy cells of `mocap_val`", "within 0.2 mm",
         ", ".join(f"{differences[f'{rig} noisy cuda bfloat16']:.2f} mm (`{rig}`)" for rig in ("h36m", "wild"))],
        ["`reverse_step` by Triton, 1 M poses, float32", "80 % of the copy rate",
         f"{percent(triton, plain, 'triton')}; with noise {percent(triton, drawn, 'triton')}"],
        ["the same against eager", "4 times",
         f"{ratio(triton, plain, 'triton', 'eager'):.1f} times; with noise "
         f"{ratio(triton, drawn, 'triton', 'eager'):.1f} times"],
        ["`hypothesis_statistics` by Triton, N = 10 and 100, moments", "75 % of the copy rate",
         f"{statistics(triton, 'triton', 'moments')}, by an earlier kernel; not measured now"],
        ["the same with a view", "75 % of the copy rate",
         f"{statistics(triton, 'triton', 'view')}, by an earlier kernel; not measured now"],
        ["the same by CUDA, moments", "75 % of the copy rate", statistics(cuda, "cuda", "moments")],
        ["the same with a view", "75 % of the copy rate", statistics(cuda, "cuda", "view")],
        ["the captured loop without nvcc, N = 10, B = 1, against eager", "4 times",
         f"{ratio(triton, FEW, 'triton-module-fp32', 'eager-fp32'):.1f} times (the module), "
         f"{ratio(triton, FEW, 'triton-fp32', 'eager-fp32'):.0f} times (the fused network)"],
    ]  # fmt: skip
    return markdown(["what", "wanted", "measured"], rows, names=3)


def times_of(name: str) -> str:
    """Return the times of a call."""
    content = content_of(name)
    machine = content["machine"]
    head = f"Commit `{content['commit']}`, {machine['gpu']}, PyTorch {machine['torch']}, one call:"
    return f"{head}\n\n{markdown(HEADER, times(content['rows']), names=2)}"


def earlier() -> str:
    """Return the times of other calls, each with its commit."""
    rows = [
        [row["case"], row["variant"], f"{row['milliseconds']:.4g}", floor(row), f"`{row['commit']}`"]
        for row in content_of("earlier")["rows"]
    ]
    return markdown(["case", "variant", "ms", "of the floor", "commit"], rows, names=2)


def main() -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the document differs")
    check = parser.parse_args().check
    tables = {
        "wanted": wanted(),
        "times of CUDA": times_of("benchmarks"),
        "times of Triton": times_of("benchmarks-triton"),
        "earlier times": earlier(),
    }
    same = rewrite(ROOT / "docs" / "gpu.md", tables, "benchmarks/gpu/tables.py", check=check)
    return 1 if check and not same else 0


if __name__ == "__main__":
    sys.exit(main())
