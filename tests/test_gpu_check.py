"""``benchmarks/gpu/check.sh`` without a GPU: what it writes, what stops it, and that a wrong result has no time."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sweeps import mostly_slow

from diffupose.errors import BackendUnavailableError
from diffupose.testing import requires_cpp

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "rates", "parity", "capture", "benchmarks", "sanitizer", "accuracy")


@pytest.fixture
def gpu(monkeypatch):
    """The modules of the stages and of what they time."""
    monkeypatch.syspath_prepend(str(ROOT))
    paths = [path for folder in ("gpu", "workloads") for path in (ROOT / "benchmarks" / folder).glob("*.py")]
    return SimpleNamespace(
        **{path.stem: importlib.import_module(f"benchmarks.{path.parent.name}.{path.stem}") for path in paths}
    )


def check(out: Path, *arguments: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "check.sh"), "--out", str(out), "--device", device, *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)


def content(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / f"{stage}.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "rates,nothing"], "unknown stage nothing, there are " + ",".join(STAGES)),
        (["--ony", "rates"], "unknown argument --ony"),
        (["--budget", "ten"], "--budget takes whole seconds, got 'ten'"),
        (["--only"], "benchmarks/gpu/check.sh [--only STAGE,...]"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_help_names_every_stage(tmp_path):
    done = check(tmp_path, "--help")
    assert done.returncode == 0
    assert all(stage in done.stdout for stage in STAGES)


def test_no_gpu_is_a_failure(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = check(tmp_path, "--only", "rates,capture", device="cuda")
    assert done.returncode == 1
    reason = "PyTorch sees no GPU; --device cpu tries the code at tiny sizes"
    assert content(tmp_path, "rates")["reason"] == reason
    assert done.stdout.count(reason) == 2  # and no traceback, nor the same again from the next stage
    assert "Traceback" not in done.stdout + done.stderr
    assert "not begun" in done.stdout


def test_a_failing_stage_does_not_stop_the_others(tmp_path):
    """Nor does one that has nothing to do; each file says what happened."""
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    out = tmp_path / "out"
    (tmp_path / "out").mkdir()
    (out / "accuracy.json").write_text("what an earlier call left")
    done = check(
        out, "--only", "parity,sanitizer,accuracy,rates", "--", "--tests", str(tmp_path / "test_two.py"),
        "--select", "test",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    parity = content(out, "parity")
    assert [row["ok"] for row in parity["rows"]] == [False, False]
    assert [parity["rows"][1][name] for name in ("passed", "failed", "skipped")] == [1, 1, 0]
    assert parity["rows"][0]["name"].endswith("test_two::test_bad")
    assert "assert 1 == 2" in parity["rows"][0]["message"]
    assert (content(out, "sanitizer")["status"], content(out, "accuracy")["status"]) == ("skipped", "skipped")
    rates = content(out, "rates")
    assert rates["status"] == "passed"
    assert {row["name"] for row in rates["rows"]} == {"copy", "bfloat16", "tf32", "float32"}
    summary = done.stdout.partition("== summary")[2]
    assert [line.split()[:2] for line in summary.splitlines()[1:] if not line.startswith(" ")] == [
        ["parity", "failed"], ["sanitizer", "skipped"], ["accuracy", "skipped"], ["rates", "passed"],
    ]  # fmt: skip


def test_a_failed_build_stops_the_others(tmp_path):
    """With a program in the place of Python that fails to build; what an earlier call left is not reported."""
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
        case $2 in *.build) exit 1;; esac
        exec {sys.executable} "$@"
        """
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "rates.json").write_text('{"status": "passed", "reason": "of an earlier call"}')
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "check.sh"), "--out", str(tmp_path), "--only", "build,rates"]
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "== rates" not in done.stdout and "earlier" not in done.stdout
    assert done.stdout.count("not begun") == 2


def test_no_time_left(tmp_path):
    done = check(tmp_path, "--only", "rates", "--budget", "0")
    assert done.returncode == 1
    assert "not begun" in done.stdout
    assert not (tmp_path / "rates.json").exists()


def test_the_gpu_stage_runs_all_tests_of_triton(gpu, tmp_path):
    """Its choice of tests finds as many as it asks for; too few are a failure."""
    tests, select, least = next(run for run in gpu.parity.ON_GPU if run[0] == ("tests/kernels",))
    if importlib.util.find_spec("triton") is not None:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", select, *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.count("::") >= least, done.stdout[-500:] + done.stderr
    (tmp_path / "test_one.py").write_text("def test_good(): pass\n")
    for least, ok in ((1, True), (2, False)):
        record = gpu.record.Record(tmp_path, "parity")
        gpu.parity.run(record, (str(tmp_path / "test_one.py"),), "", least)
        assert [row["ok"] for row in record.content["rows"]] == [ok]


@requires_cpp
@pytest.mark.parametrize("triton", mostly_slow([False, True]))
def test_benchmarks_are_written(tmp_path, triton, monkeypatch):
    """Every op and both networks at tiny sizes, with the floors of the same call; by Triton in its interpreter."""
    if triton:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = check(tmp_path, "--only", "rates,benchmarks", "--", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    rates = {row["name"]: row for row in content(tmp_path, "rates")["rows"]}
    rows = content(tmp_path, "benchmarks")["rows"]
    ops = {row["case"].split()[0] for row in rows}
    assert ops == {"modulated_graph_conv", "reverse_step", "hypothesis_statistics", "philox_normal", "sample", "lift"}
    variants = {row["variant"] for row in rows}
    assert variants >= {"eager", "cpp", "cpp-bf16", "cpp-fp32", "eager-fp32", "eager-bf16"}
    assert not triton or variants >= {"triton", "triton-bf16", "triton-fp32", "triton-module-fp32"}
    # Only what a backend does not take may be without a time.
    unfit = [row for row in rows if "not_run" in row]
    assert all(re.search(r"takes (sample in )?float32", row["not_run"]) for row in unfit)
    rows = [row for row in rows if row not in unfit]
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["error"] <= row["limit"] < 0.1
        if "of_copy_rate" in row:
            rate = rates["copy"]["bytes_a_second"]
            assert row["of_copy_rate"] == pytest.approx(row["bytes"] / rate / (1e-3 * row["milliseconds"]))
        if "of_product_rate" in row:
            rate = rates[row["of"]]["flops_a_second"]
            assert row["of_product_rate"] == pytest.approx(row["flops"] / rate / (1e-3 * row["milliseconds"]))
        assert "of_copy_rate" in row or "of_product_rate" in row


def test_table_of_times(gpu):
    rows = [
        {"case": "one", "variant": "eager-bf16", "milliseconds": 3.0, "of_product_rate": 0.1},
        {"case": "one", "variant": "eager-fp32", "milliseconds": 9.0, "of_product_rate": 0.1},
        {
            "case": "one",
            "variant": "ours-bf16",
            "milliseconds": 2.0,
            "of_product_rate": 0.4,
            "kernel_of_copy_rate": 0.8,
        },
        {"case": "two", "variant": "ours", "milliseconds": 1.0, "of_copy_rate": 0.5, "in_graph": False},
        {"case": "two", "variant": "wrong", "error": 1.0, "ok": False},
        {"case": "three", "variant": "ours-bf16", "milliseconds": 2.0},
        {"case": "three", "variant": "eager-fp32", "milliseconds": 5.0},
    ]
    assert gpu.table.times(rows) == [
        ["one", "eager-bf16", "3", "1.00", "10 % (product)"],
        ["one", "eager-fp32", "9", "1.00", "10 % (product)"],
        ["one", "ours-bf16", "2", "1.50", "80 % (copy)"],
        ["two", "ours, not in a graph", "1", "", "50 % (copy)"],
        ["three", "ours-bf16", "2", "2.50", ""],  # beside float32 where there is no other
        ["three", "eager-fp32", "5", "1.00", ""],
    ]


@requires_cpp
def test_capture_runs_every_op(tmp_path):
    done = check(tmp_path, "--only", "capture")
    assert done.returncode == 0, done.stdout + done.stderr
    names = {row["name"] for row in content(tmp_path, "capture")["rows"]}
    assert names >= {
        "cpp reverse_step by a row on the host, scaled", "cpp philox_normal 3x5x51", "cpp sample mocap cpp-bf16",
        "cpp modulated_graph_conv 16x17x24x40 fp32 forward and backward",
    }  # fmt: skip


def test_record_is_on_the_disk_at_once(gpu, tmp_path):
    record = gpu.record.Record(tmp_path, "stage")
    assert content(tmp_path, "stage")["status"] == "cut off"
    record.add(name="first", ok=True)
    assert content(tmp_path, "stage")["rows"] == [{"name": "first", "ok": True}]


def test_stage_that_raises(gpu, tmp_path):
    def body(record, arguments):
        record.add(name="first", ok=True)
        raise ValueError("no")

    arguments = argparse.Namespace(out=tmp_path, device="cpu")
    assert gpu.record.run_stage("stage", arguments, body) == 1
    written = content(tmp_path, "stage")
    assert (written["status"], written["reason"]) == ("failed", "ValueError: no")
    assert written["rows"] == [{"name": "first", "ok": True}]
    assert "raise ValueError" in written["traceback"]


@pytest.mark.parametrize("factor", [1.0, 1.001, float("nan")])
def test_only_a_right_result_has_a_time(gpu, factor):
    truth = torch.randn(5, 3)
    variants = {"ours": lambda: [lambda: truth * factor]}
    case = gpu.case.Case("case", variants, lambda: [truth[:2]], bytes=120)
    row = gpu.benchmarks.row_of(case, "ours", torch.device("cpu"), {"copy": 1e9})
    assert ("milliseconds" in row) == (factor == 1.0)
    assert row.get("ok", True) == (factor == 1.0)


def test_times_use_all_buffers(gpu):
    used = set()
    calls = [lambda i=i: used.add(i) for i in range(7)]
    found = gpu.measure.milliseconds(calls, torch.device("cpu"), seconds=0.01)
    assert used == set(range(7))
    assert found["quartile_1"] <= found["milliseconds"] <= found["quartile_3"]


def test_same_bits(gpu):
    value = torch.tensor([1.0, float("nan"), -0.0])
    assert gpu.capture.same([[value.clone()]], [value])
    for other in (torch.tensor([1.0, float("nan"), 0.0]), value[:2]):
        assert not gpu.capture.same([[value.clone()], [other]], [value])
    assert not gpu.capture.same([[value, value]], [value])


@requires_cpp
def test_every_op_has_inputs_that_a_busy_stream_can_hold_back(gpu):
    for name, make in gpu.every_op.calls(torch.device("cpu"), "cpp").items():
        inputs = gpu.capture.inputs_of(make())
        assert any(value.is_floating_point() for value in inputs) or name.startswith("philox_normal"), name


MEMCHECK = "========= COMPUTE-SANITIZER\n9 calls ran\n========= ERROR SUMMARY: 0 errors\n"
RACECHECK = "9 calls ran\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("text", "status", "ok"),
    [
        (MEMCHECK, 0, True),
        (RACECHECK, 0, True),
        (MEMCHECK, 9, False),
        (MEMCHECK.replace("0 errors", "3 errors"), 0, False),
        (RACECHECK.replace("0 hazards", "1 hazard"), 0, False),
        (MEMCHECK.replace("9 calls ran", "0 calls ran"), 0, False),
        (MEMCHECK.replace("9 calls ran\n", ""), 0, False),
        ("9 calls ran\n", 0, False),
    ],
)
def test_verdict_of_the_sanitizer(gpu, text, status, ok):
    assert gpu.sanitizer.verdict(text, status) is ok


HAZARD = """========= Error: Race reported between Read access at void diffupose::wgmma_kernel<(int)17>(int)+0x10
=========     and Write access at void diffupose::wgmma_kernel<(int)17>(int)+0x20 [128 hazards]
9 calls ran
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("persistent", "failed", "not_judged"),
    [
        (HAZARD, [], True),
        (HAZARD.replace("wgmma_kernel<(int)17>(int)+0x20", "other_kernel(int)"), [2], False),
        (HAZARD.replace("9 calls ran", "Traceback"), [2], False),
        (RACECHECK, [], False),
    ],
)
def test_hazards_that_racecheck_cannot_judge(gpu, tmp_path, monkeypatch, persistent, failed, not_judged):
    """With a program in the place of compute-sanitizer."""
    for name, text in (("persistent", persistent), ("memcheck", MEMCHECK), ("racecheck", RACECHECK)):
        (tmp_path / name).write_text(text)
    (tmp_path / "compute-sanitizer").write_text(
        f"""#!/bin/sh
        for last; do :; done
        if [ "$last" = persistent ]; then
            cat {tmp_path}/persistent
            grep -q ' 0 hazards' {tmp_path}/persistent || exit 9
        else cat {tmp_path}/$2; fi
        """
    )
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setattr(gpu.sanitizer, "CANDIDATES", (str(tmp_path / "compute-sanitizer"),))
    record = gpu.record.Record(tmp_path, "sanitizer")
    gpu.sanitizer.body(record, SimpleNamespace(device="cuda", seconds=30.0, tool_seconds=None))
    rows = record.content["rows"]
    assert [row["name"] for row in rows] == list(gpu.sanitizer.RUNS)
    assert [index for index, row in enumerate(rows) if row.get("ok") is False] == failed
    assert ("not_judged" in rows[2]) == not_judged


@pytest.mark.slow
def test_every_op_runs_on_cuda(gpu, emulated_cuda):
    """What the sanitizer watches, emulated: every op of the backend, and the engine in all its forms."""
    calls = gpu.every_op.calls(torch.device("cpu"), "cuda")
    ran = []
    for name, make in calls.items():
        if "paper" not in name and name.startswith("sample"):  # as it, and slow where GPU threads take turns
            continue
        try:
            result = gpu.case.tensors_of(make()())
        except BackendUnavailableError:
            continue
        assert all(bool(torch.isfinite(value).all()) for value in result), name
        ran.append(name)
    assert ran
    assert {name for name in ran if name.startswith("sample")} == {
        "sample paper-64 layers-fp32", "sample paper-64 layers-bf16", "sample paper-64 persistent-bf16",
        "sample paper-64 cluster-bf16",
    }  # fmt: skip
    assert "sample base-64 cluster-bf16" in calls
