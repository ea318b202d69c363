"""Time the Triton kernels on a GPU beside eager PyTorch and ``torch.compile``: ``python benchmarks/gpu_triton.py``.

Writes ``gpu_triton.json`` into the folder ``--out``: GPU, versions, commit, the rate of a copy, and a row per case.
Where memory is the limit, ``bytes`` is what a pass has to read and write, and ``over_copy`` the rate at which that
happened over the rate of the copy. ``--device cpu`` runs every case once, small, in Triton's interpreter, and times
nothing: it checks this script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each variant")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


OPTIONS = arguments()
if OPTIONS.device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
elif os.environ.get("TRITON_INTERPRET"):
    sys.exit("TRITON_INTERPRET is set: nothing would be measured")

import torch  # noqa: E402

import diffupose  # noqa: E402
from diffupose import Lifter, ops, reference  # noqa: E402
from diffupose.config import PAPER  # noqa: E402
from diffupose.denoiser import build_denoiser  # noqa: E402
from diffupose.ops import captured_loop  # noqa: E402
from diffupose.ops.fused_network import FusedNetwork  # noqa: E402
from diffupose.programs import layer_program  # noqa: E402
from diffupose.schedule import NoiseSchedule, step_table  # noqa: E402
from diffupose.testing import make_inputs  # noqa: E402

ON_GPU = OPTIONS.device == "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


def milliseconds(call: Callable[[], Any], rounds: int) -> float | None:
    """Return the median time of a call on the GPU, or run it once and return None."""
    if not ON_GPU:
        call()
        return None
    for _ in range(5):
        call()
    pairs = []
    torch.cuda.synchronize()
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def wall_milliseconds(call: Callable[[], Any], rounds: int) -> float | None:
    """Return the median time of a call as its caller sees it, until the result is there."""
    if not ON_GPU:
        call()
        return None
    times = []
    for _ in range(rounds + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[5:])


def copy_rate() -> float | None:
    """Return the bytes a second that a copy reads and writes, larger than any cache; None where nothing is timed."""
    size = 1 << 28 if ON_GPU else 1 << 10
    source, target = torch.zeros(2, size, device=OPTIONS.device).unbind(0)
    taken = milliseconds(partial(target.copy_, source), OPTIONS.rounds)
    return None if taken is None else 2 * 4 * size / (taken / 1e3)


def rows_of(
    case: str,
    variants: dict[str, Callable[[], Callable[[], Any]]],
    rate: float | None,
    bytes_moved: dict[str, int] | None = None,
    clock: Callable[[Callable[[], Any], int], float | None] = milliseconds,
) -> list[Row]:
    """Time variants, each made by a function of its own, so that one that fails leaves the others."""
    rows: list[Row] = []
    for name, make in variants.items():
        if name == "compile" and OPTIONS.no_compile:
            continue
        row: Row = {"case": case, "variant": name}
        try:
            row["milliseconds"] = taken = clock(make(), OPTIONS.rounds)
        except Exception as error:  # one failure must not cost what else the GPU is lent for
            row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            continue
        if bytes_moved and name in bytes_moved:
            row["bytes"] = bytes_moved[name]
            if taken is not None and rate is not None:
                row["over_copy"] = bytes_moved[name] / (taken / 1e3) / rate
        rows.append(row)
    times = {row["variant"]: row.get("milliseconds") for row in rows}
    for row in rows:
        for peer in ("eager", "compile"):
            if row["variant"] != peer and row.get("milliseconds") and times.get(peer):
                row[f"times_{peer}"] = times[peer] / row["milliseconds"]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# --- reverse_step: a million poses. -----------------------------------------------------------------------------------


def chain(sample: Any, output: Any, row: Any, noise: Any) -> tuple[Any, Any]:
    """The step as one writes it in PyTorch, with the row on the device."""
    p, q, c_x, c_0, _, s = row.unbind(0)
    x0 = (p * sample + q * output).clamp(-1.0, 1.0)
    return (c_x * sample + c_0 * x0 + s * noise if noise is not None else c_x * sample + c_0 * x0), x0


def bench_reverse_step(rate: float | None) -> list[Row]:
    from diffupose.kernels.reverse_step import reverse_step

    frames, hypotheses, joints = (100_000, 10, 17) if ON_GPU else (3, 2, 17)
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for drawn in (False, True):
            sample, output = torch.randn(2, frames, hypotheses, joints, 3, device=OPTIONS.device).to(dtype).unbind(0)
            steps = step_table(NoiseSchedule(100), 10, sampler="ddpm" if drawn else "ddim", prediction_type="sample")
            table = steps.tensor().to(OPTIONS.device)
            step = torch.full((1,), 3, dtype=torch.int64, device=OPTIONS.device)
            ids = torch.arange(frames, device=OPTIONS.device), torch.arange(hypotheses, device=OPTIONS.device)
            fused = partial(reverse_step, sample, output, table, step, clip_sample_range=1.0,
                            seed=torch.zeros(1, dtype=torch.int64, device=OPTIONS.device),
                            ids=ids if drawn else None)  # fmt: skip
            row = table[3].to(dtype)

            def eager(step: Callable[..., Any], sample=sample, output=output, row=row, drawn=drawn) -> Any:
                return step(sample, output, row, torch.randn_like(sample) if drawn else None)

            size = sample.numel() * sample.element_size()
            rows += rows_of(
                f"reverse_step {frames}x{hypotheses}x{joints} {dtype_name} {'drawn' if drawn else 'deterministic'}",
                {
                    "eager": lambda eager=eager: partial(eager, chain),
                    "compile": lambda eager=eager: partial(compiled(eager), chain),
                    "triton": lambda fused=fused: fused,
                    "triton in place": lambda fused=fused, sample=sample: partial(fused, out=(sample, None)),
                },
                rate,
                {"triton": 4 * size, "triton in place": 3 * size},
            )
    return rows


# --- hypothesis_statistics. -------------------------------------------------------------------------------------------


def bench_hypothesis_statistics(rate: float | None) -> list[Row]:
    rows = []
    for frames, count in ((100_000, 10), (20_000, 50), (5_000, 200)) if ON_GPU else ((2, 10), (1, 70)):
        hypotheses, *view = make_inputs("hypothesis_statistics", (frames, count, 17), device=OPTIONS.device)
        names = ("keypoints_2d", "confidence", "intrinsics")
        for with_view in (False, True):
            given = view if with_view else [None] * 3
            options = dict(zip(names, view, strict=True)) if with_view else {}
            plain = partial(reference.hypothesis_statistics, hypotheses, *given)
            fused = partial(ops.hypothesis_statistics, hypotheses, **options, backend="triton")
            moved = hypotheses.numel() + frames * 17 * 12
            if with_view:
                moved += sum(tensor.numel() for tensor in view) + frames * (count + 17 * 3)
            rows += rows_of(
                f"hypothesis_statistics {frames}x{count}x17 {'reprojection' if with_view else 'moments'}",
                {
                    "eager": lambda plain=plain: plain,
                    "compile": lambda given=given, hypotheses=hypotheses: partial(
                        compiled(reference.hypothesis_statistics), hypotheses, *given
                    ),
                    "triton": lambda fused=fused: fused,
                },
                rate,
                {"triton": 4 * moved},
            )
    return rows


# --- modulated_graph_conv: forward, and with its gradients. -----------------------------------------------------------


def bench_modulated_graph_conv(rate: float | None) -> list[Row]:
    rows = []
    for poses, channels in ((170, 384), (16_384, 384)) if ON_GPU else ((2, 8),):
        for dtype_name, dtype in DTYPES.items():
            for backward in (False, True):
                inputs = make_inputs("modulated_graph_conv", (poses, 17, channels, channels), dtype=dtype,
                                     device=OPTIONS.device, requires_grad=backward)  # fmt: skip
                grad_out = torch.randn(poses, 17, channels, device=OPTIONS.device).to(dtype)

                def run(function: Callable[..., Any], inputs=inputs, grad_out=grad_out, backward=backward) -> Any:
                    out = function(*inputs)
                    return torch.autograd.grad(out, inputs, grad_out) if backward else out

                rows += rows_of(
                    f"modulated_graph_conv {poses}x17x{channels}x{channels} {dtype_name} "
                    f"{'forward and backward' if backward else 'forward'}",
                    {
                        "eager": lambda run=run: partial(run, reference.modulated_graph_conv),
                        "compile": lambda run=run: partial(run, compiled(reference.modulated_graph_conv)),
                        "triton": lambda run=run: partial(run, partial(ops.modulated_graph_conv, backend="triton")),
                    },
                    rate,
                )
            rows += bench_epilogue(poses, channels, dtype_name, rate)
    return rows


def bench_epilogue(poses: int, channels: int, dtype_name: str, rate: float | None) -> list[Row]:
    """What follows the product in inference, with BatchNorm folded, ReLU and residual: a pass over memory."""
    from diffupose.kernels.modulated_graph_conv import modulated_graph_conv_fwd

    dtype, device = DTYPES[dtype_name], OPTIONS.device
    hidden = torch.randn(poses, 17, 2 * channels, device=device).to(dtype)
    residual, out = torch.randn(2, poses, 17, channels, device=device).to(dtype).unbind(0)
    modulation, adjacency = torch.randn(17, channels, device=device), torch.randn(17, 17, device=device)
    bias = torch.randn(channels, device=device)

    def eager(hidden: Any, residual: Any) -> Any:
        own, neighbor = (modulation.to(dtype) * part for part in hidden.chunk(2, dim=-1))
        diagonal = adjacency.diagonal()
        mixed = diagonal[:, None].to(dtype) * own + (adjacency - torch.diag(diagonal)).to(dtype) @ neighbor
        return torch.relu(mixed + bias.to(dtype)) + residual

    fused = partial(modulated_graph_conv_fwd, hidden, modulation, adjacency, bias, out, activation="relu",
                    residual=residual)  # fmt: skip
    return rows_of(
        f"modulated_graph_conv {poses}x17x{channels} {dtype_name} epilogue with ReLU and residual",
        {
            "eager": lambda: partial(eager, hidden, residual),
            "compile": lambda: partial(compiled(eager), hidden, residual),
            "triton": lambda: fused,
        },
        rate,
        {"triton": 4 * residual.numel() * dtype.itemsize},
    )


# --- The whole reverse process: a captured loop beside an eager one. --------------------------------------------------


def bench_loop(rate: float | None) -> list[Row]:
    networks = {"mocap": Lifter.from_pretrained("mocap", device=OPTIONS.device).denoiser}
    if ON_GPU:
        torch.manual_seed(0)  # the time does not depend on the weights
        networks["paper-384"] = build_denoiser(PAPER.denoiser).to(OPTIONS.device).eval()
    rows = []
    for name, network in networks.items():
        channels = network.config.num_condition_channels
        inputs = torch.randn(1, 17 if name == "mocap" else network.gconv_input.gconv.adjacency.shape[0], channels)
        inputs = inputs.to(OPTIONS.device)
        program, count = layer_program(network), 1000  # more timesteps than any table here has
        forms: dict[str, Any] = {"triton": network}
        forms |= {f"triton fused {precision}": FusedNetwork(program, count, precision, OPTIONS.device)
                  for precision in ("float32", "bfloat16")}  # fmt: skip
        for steps in (5, 10, 100) if ON_GPU else (2,):
            # Without fresh noise: drawn in plain PyTorch it would slow the eager loop as nobody would let it.
            table = step_table(NoiseSchedule(100), steps, sampler="ddim", prediction_type="sample")

            def draw(backend: str, network=network, inputs=inputs, table=table) -> Any:
                return ops.sample(network, inputs, table, num_hypotheses=10, backend=backend)

            def form(name: str, draw=draw, forms=forms) -> Any:
                return partial(draw, "triton", forms[name])

            def stepwise(draw=draw) -> Any:
                """The Triton step without a graph."""
                kept, captured_loop._MOST_ROWS = captured_loop._MOST_ROWS, 0
                try:
                    return draw("triton")
                finally:
                    captured_loop._MOST_ROWS = kept

            rows += rows_of(
                f"sample {name} B=1 N=10 S={steps}",
                {
                    "eager": lambda draw=draw: partial(draw, "torch"),
                    "triton, not captured": lambda stepwise=stepwise: stepwise,
                    **{name: partial(form, name) for name in forms},
                },
                rate,
                clock=wall_milliseconds,
            )
    return rows


def git(*command: str) -> str:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def main() -> int:
    import triton

    if not ops.available_backends()["triton"][0]:
        sys.exit(f"nothing to measure: {ops.available_backends()['triton'][1]}")
    content: Row = {
        "device": torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()}, interpreted, not timed",
        "capability": torch.cuda.get_device_capability() if ON_GPU else None,
        "versions": {
            "diffupose": diffupose.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton.__version__,
        },
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "rounds": OPTIONS.rounds,
    }  # fmt: skip
    with torch.no_grad():
        content["copy_bytes_per_second"] = rate = copy_rate()
        rows = bench_reverse_step(rate) + bench_hypothesis_statistics(rate) + bench_loop(rate)
    rows += bench_modulated_graph_conv(rate)
    content["rows"] = rows
    OPTIONS.out.mkdir(parents=True, exist_ok=True)
    path = OPTIONS.out / "gpu_triton.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in rows if "error" in row]
    print(f"{path}: {len(rows)} rows, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
