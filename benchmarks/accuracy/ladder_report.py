"""Make the tables and plots of ``docs/ablation.md`` from ``benchmarks/results/``.

python -m benchmarks.accuracy.ladder_report [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.accuracy.scores import RESULTS
from benchmarks.workloads.table import markdown, rewrite

DOCS = RESULTS.parents[1] / "docs"
CELLS = ("h36m noisy", "wild noisy")
SEED = re.compile(r"-s\d+$")


def rungs() -> list[dict[str, Any]]:
    """Return what was measured of all rungs, by name."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "ablation").glob("*.json"))]


def ladder() -> str:
    """Return the table of all rungs, of their first seed."""
    rows = []
    for result in rungs():
        if SEED.search(result["rung"]):
            continue
        cells = [result["cells"][name] for name in CELLS]
        numbers = [f"{cell[key]:.1f}" for key in ("mpjpe", "energy_score") for cell in cells]
        spread = ["" if cell.get("dispersion") is None else f"{cell['dispersion']:.2f}" for cell in cells]
        curve = " → ".join(f"{sum(point[1:]) / 2:.1f}" for point in result["curve"])
        rows.append([
            result["rung"], result["what"], f"{result['parameters']:,}", f"{result['training_seconds']:.0f}", curve,
            *numbers, "/".join(spread).strip("/"),
        ])  # fmt: skip
    rows.sort(key=lambda row: float(row[5]) + float(row[6]))
    header = ["rung", "what", "parameters", "training, s", "curve", "MPJPE h36m", "MPJPE wild", "energy h36m",
              "energy wild", "dispersion"]  # fmt: skip
    return markdown(header, rows, names=2)


def seeds() -> str:
    """Return the table of the rungs that were trained with several seeds: means and, in brackets, their range."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in rungs():
        by_name.setdefault(SEED.sub("", result["rung"]), []).append(result)
    rows = []
    for name, results in by_name.items():
        if len(results) < 2:
            continue
        row = [name, str(len(results))]
        for key in ("mpjpe", "energy_score"):
            for cell in CELLS:
                values = [result["cells"][cell][key] for result in results]
                row.append(f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        rows.append(row)
    rows.sort(key=lambda row: float(row[2].split()[0]) + float(row[3].split()[0]))
    header = ["rung", "seeds", "MPJPE h36m", "MPJPE wild", "energy h36m", "energy wild"]
    return markdown(header, rows)


def choices() -> str:
    """Return the tables of one pose out of ten: without a camera, and with one by weight and temperature."""
    content = json.loads((RESULTS / "sampling.json").read_text())
    rows = [[name, *(f"{cells[cell]['mpjpe']:.1f}" for cell in CELLS)]
            for name, cells in content["aggregation"].items()]  # fmt: skip
    by_setting: dict[tuple[float, float], dict[str, float]] = {}
    for row in content["camera"]:
        by_setting.setdefault((row["weight"], row["temperature"]), {})[row["cell"]] = row["mpjpe"]
    for (weight, temperature), errors in by_setting.items():
        name = f"camera: weight {weight:g}, " + (f"temperature {temperature:g}" if temperature else "all alike")
        rows.append([name, *(f"{errors[cell]:.1f}" for cell in CELLS)])
    return markdown(["one pose out of ten", "MPJPE h36m", "MPJPE wild"], rows)


def sampled() -> list[dict[str, Any]]:
    """Return what was measured of samplers, by number of steps and of hypotheses."""
    return json.loads((RESULTS / "sampling.json").read_text())["rows"]


def mean(row: dict[str, Any], key: str) -> float:
    """Return a score's mean over the cells."""
    return sum(row["cells"][name][key] for name in CELLS) / len(CELLS)


def sampling() -> str:
    """Return the table of samplers."""
    lines = [
        [row["curve"], str(row["num_inference_steps"]), str(row["num_hypotheses"]),
         *(f"{row['cells'][name][key]:.1f}" for key in ("mpjpe", "energy_score") for name in CELLS),
         "" if row["cells"][CELLS[0]].get("dispersion") is None else f"{mean(row, 'dispersion'):.2f}"]
        for row in sampled()
    ]  # fmt: skip
    header = ["curve", "steps", "N", "MPJPE h36m", "MPJPE wild", "energy h36m", "energy wild", "dispersion"]
    return markdown(header, lines)


def plot() -> None:
    """Draw error against steps and against N."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sampled():
        curves.setdefault(row["curve"], []).append(row)
    by_steps = ((axes[0], "num_inference_steps", "mpjpe"), (axes[1], "num_inference_steps", "energy_score"))
    for name, curve in curves.items():
        by_count = name in ("independent", "antithetic")
        for axis, x, y in ((axes[2], "num_hypotheses", "mpjpe"),) if by_count else by_steps:
            axis.plot([row[x] for row in curve], [mean(row, y) for row in curve], "o-", label=name)
    for axis, x, y in zip(
        axes,
        ("steps", "steps", "hypotheses N"),
        ("MPJPE of the mean of 10, mm", "energy score of 10, mm", "MPJPE of the mean of N, mm"),
        strict=True,
    ):
        axis.set(xscale="log", xlabel=x, ylabel=y)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(DOCS / "ablation.png", dpi=80)


def equal_samples() -> str:
    """Return the table of recipes trained on the same samples, scored on the validation people."""
    rows = []
    for path in sorted((RESULTS / "validation").glob("equal-samples-*.json")):
        content = json.loads(path.read_text())
        cells = [content[name] for name in CELLS]
        calls = content["settings"]["num_inference_steps"] if "N=1" not in cells[0] else 1
        recipe = re.sub("-(quarter|eighth)$", "", path.stem.removeprefix("equal-samples-"))
        steps, batch = (
            int(re.search(rf"--{name} (\d+)", content["trained_by"])[1]) for name in ("steps", "batch-size")
        )
        samples = steps * batch
        for count in cells[0]:
            scores = [cell[count] for cell in cells]
            rows.append([
                recipe, f"{samples / 1e6:.2f}", f"{content['parameters']:,}", str(calls), count,
                *(f"{row[key]:.1f}" for key in ("mpjpe", "energy_score") for row in scores),
            ])  # fmt: skip
    rows.sort(key=lambda row: -float(row[1]))
    header = ["recipe", "million samples", "parameters", "calls", "N", "MPJPE h36m", "MPJPE wild", "energy h36m",
              "energy wild"]  # fmt: skip
    return markdown(header, rows)


def honesty() -> str:
    """Return the table of the bundled model's uncertainty on the validation people, by sampler and N."""
    rows = []
    for name, what in (("raw", "default"), ("5-steps", "5 steps"), ("100-steps", "100 steps"),
                       ("plain-ddim", "plain DDIM, 7 steps")):  # fmt: skip
        path = RESULTS / "validation" / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        cells = content.get("cells", content)
        for count in ("N=10", "N=50"):
            scores = [cells[cell][count] for cell in CELLS if count in cells[cell]]
            if scores:
                keys = (("mpjpe", 1), ("energy_score", 1), ("dispersion", 3), ("spearman", 2), ("coverage_50", 3),
                        ("coverage_90", 3), ("ece", 3))  # fmt: skip
                rows.append([what, count, *("/".join(f"{row[key]:.{digits}f}" for row in scores)
                                            for key, digits in keys)])  # fmt: skip
    header = ["sampler", "N", "MPJPE", "energy", "dispersion", "rho", "in 50 %", "in 90 %", "ECE"]
    return markdown(header, rows, names=2)


def main() -> int:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the document differs")
    check = parser.parse_args().check
    tables = {
        "ladder": ladder(), "seeds": seeds(), "sampling": sampling(), "choices": choices(),
        "equal samples": equal_samples(), "honesty": honesty(),
    }  # fmt: skip
    same = rewrite(DOCS / "ablation.md", tables, "benchmarks/accuracy/ladder_report.py", check=check)
    if not check:
        plot()
    return 1 if check and not same else 0


if __name__ == "__main__":
    sys.exit(main())
