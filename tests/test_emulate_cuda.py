"""The .cu files without a GPU: faulty kernels are found, every launch has a case, every barrier is tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.compiled import locked

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import emulate_cuda  # noqa: E402
import mutate_barriers  # noqa: E402
from toolchain import find_compiler, find_ninja  # noqa: E402

BUILD = ROOT / "build" / "emulated_cuda"
# What must find each fault of tests/cpp/cuda_faults: the mode, the order and the reason.
FAULTS = {
    "missing_barrier": [("fibres", "forward", "wrong result"), ("threads", "forward", "race")],
    "missing_warp_barrier": [("fibres", "forward", "wrong result"), ("threads", "forward", "race")],
    "shuffle_orders": [("threads", "forward", "race")],
    "divergent_barrier": [("fibres", "forward", "deadlock")],
    "early_return": [("fibres", "forward", "deadlock"), ("threads", "forward", "deadlock")],
    "divergent_warp": [("fibres", "forward", "deadlock"), ("threads", "forward", "deadlock")],
    "unmet_arrival": [("fibres", "forward", "misuse"), ("threads", "forward", "misuse")],
    "absent_lane": [("fibres", "forward", "misuse"), ("threads", "forward", "misuse")],
    "shared_overrun": [("addresses", "random", "address")],
    "global_overrun": [("addresses", "random", "address")],
    "misaligned": [("addresses", "random", "undefined behaviour")],
    "unwritten_shared": [("fibres", "forward", "wrong result"), ("threads", "forward", "wrong result")],
    "never_waits": [("fibres", "forward", "misuse"), ("threads", "forward", "misuse")],
    "block_order": [("fibres", "reverse", "wrong result")],
}
RUNS = [(mode, order) for mode, orders in emulate_cuda.ORDERS.items() for order in orders]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> list[str]:
    if os.environ.get("DIFFUPOSE_BUILD") == "none":
        pytest.skip("DIFFUPOSE_BUILD=none: nothing is compiled")
    compiler = find_compiler()
    if not compiler or not find_ninja():
        pytest.skip("no C++ compiler or no ninja")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "main.cpp").write_text("int main() { return 0; }\n")
    for flags in emulate_cuda.MODES.values():
        command = [*compiler, *flags, "main.cpp", "-o", "main"]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            pytest.skip(f"the compiler has no {' '.join(flags)}")
    return compiler


def built(name: str, modes=emulate_cuda.MODES) -> emulate_cuda.Workspace:
    folder = f"tests/cpp/{name}"
    workspace = emulate_cuda.Workspace(BUILD / name, sources=folder, cases=f"{folder}/cases")
    with locked(BUILD / name):  # what did not change is not compiled again, by whichever process
        workspace.update()
        outcome = workspace.build(modes)
    assert not outcome.reason, outcome.output
    return workspace


@pytest.fixture
def faults(compiler) -> emulate_cuda.Workspace:
    return built("cuda_faults")


@pytest.fixture
def faulty_fibres(compiler) -> emulate_cuda.Workspace:
    return built("cuda_faults", ["fibres"])


def test_a_fault_is_found(faulty_fibres):
    outcome = faulty_fibres.run("fibres", "forward", ["missing_barrier"], timeout=120)
    assert outcome.reason == "wrong result", outcome.output
    assert not (outcome := faulty_fibres.run("fibres", "forward", ["none"], timeout=120)).reason, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(faults, fault):
    for mode, order, reason in FAULTS[fault]:
        outcome = faults.run(mode, order, [fault], timeout=120)
        assert outcome.reason == reason, f"{mode} {order}: {outcome.output}"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "order"), RUNS)
def test_a_good_kernel_passes(faults, mode, order):
    assert not (outcome := faults.run(mode, order, ["none"], timeout=120)).reason, outcome.output


def test_a_wrong_order_is_refused(faulty_fibres):
    assert "must be forward, reverse or random" in faulty_fibres.run("fibres", "sideways", ["none"]).output


def test_an_unknown_case_is_refused(faulty_fibres):
    assert "no such case" in faulty_fibres.run("fibres", "forward", ["none", "nothing"]).output


def test_every_fault_has_a_test():
    cases = re.findall(r"CUDA_CASE\((\w+)\)", (ROOT / "tests/cpp/cuda_faults/cases/faults.cpp").read_text())
    assert sorted(cases) == sorted([*FAULTS, "none"])


LAUNCH = re.compile(r"DIFFUPOSE_LAUNCH(?:_EARLY)?\(\s*((?:[^,()]|\((?:[^()]|\([^()]*\))*\))+),")


def test_launch_pattern():
    text = "DIFFUPOSE_LAUNCH((kernel<float,\n  f(2)>), g(1), 2);  DIFFUPOSE_LAUNCH(plain, 1, 2, 0, s)"
    text += "DIFFUPOSE_LAUNCH_EARLY(early, 1, 2, 0, s, true)"
    assert [" ".join(kernel.split()) for kernel in LAUNCH.findall(text)] == ["(kernel<float, f(2)>)", "plain", "early"]


@pytest.mark.slow
def test_every_launch_has_a_case(compiler):
    """What csrc launches, as it is written there, is launched by a case of tests/cpp/cuda_cases."""
    workspace = emulate_cuda.Workspace(BUILD / "base")
    with locked(BUILD / "base"):
        workspace.update()
        outcome = workspace.build(["fibres"])
    assert not outcome.reason, outcome.output
    launched = {
        (file, kernel)
        for files in workspace.launched().values()
        for file, kernels in files.items()
        for kernel in kernels
    }
    written = {
        (path.relative_to(ROOT).as_posix(), " ".join(kernel.split()))
        for path in (ROOT / "csrc").rglob("*.cu*")
        for kernel in LAUNCH.findall(path.read_text())
    }
    assert written
    assert not written - launched


def copy_of_sample(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for folder in ("csrc/common", "tests/cpp"):
        shutil.copytree(ROOT / folder, root / folder)
    return root


def mutate(root: Path, tmp_path: Path, *arguments: str) -> int:
    folder = "tests/cpp/cuda_sample"
    given = ["--root", str(root), "--sources", folder, "--cases", f"{folder}/cases", "--build", str(tmp_path / "build")]
    return mutate_barriers.main([*given, *arguments])


@pytest.mark.slow
def test_mutations(compiler, tmp_path, capsys):
    """Barriers that are needed are caught, one that is not is missed, and a second run remembers both."""
    root = copy_of_sample(tmp_path)
    path = root / "tests/cpp/cuda_sample/row_norm_cuda.cu"
    text = path.read_text()
    spare = "        float total = 0.0f;\n"
    assert text.count(spare) == 1
    path.write_text(text.replace(spare, f"        __syncwarp();  // __syncthreads() came before\n{spare}"))
    line = path.read_text()[: path.read_text().index("came before")].count("\n") + 1
    assert mutate(root, tmp_path, "row_norm", "--budget", "0") == 2
    assert "barriers: 0 caught, 0 missed, 5 not tried" in capsys.readouterr().out
    for _ in range(2):
        assert mutate(root, tmp_path, "row_norm") == 1
        output = capsys.readouterr().out
        assert "barriers: 4 caught, 1 missed, 0 not tried" in output
        assert [row for row in output.splitlines() if row.endswith("MISSED")] == [
            row for row in output.splitlines() if f"row_norm_cuda.cu:{line} " in row
        ]


@pytest.mark.slow
def test_mutations_need_cases_that_pass(compiler, tmp_path):
    root = copy_of_sample(tmp_path)
    path = root / "tests/cpp/cuda_sample/row_norm_cuda.cu"
    path.write_text(path.read_text().replace("__syncthreads();", ""))
    with pytest.raises(SystemExit, match="the cases fail as they are"):
        mutate(root, tmp_path, "row_norm")


def test_barriers_in_comments_do_not_count(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cuh").write_text(
        "// __syncthreads();\n/* __syncwarp();\n*/ __syncthreads (); // __syncthreads()\nf(); __syncwarp(kMask);\n"
    )
    found = mutate_barriers.barriers_of(tmp_path, "csrc")
    assert [(barrier.name, barrier.text) for barrier in found] == [
        ("csrc/kernel.cuh:3", "__syncthreads ()"),
        ("csrc/kernel.cuh:4", "__syncwarp(kMask)"),
    ]
