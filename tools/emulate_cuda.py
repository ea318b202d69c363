"""Run the .cu files without a GPU, under sanitizers: ``python tools/emulate_cuda.py [CASE ...]``.

The kernels and the cases of ``tests/cpp/cuda_cases`` are compiled as C++ with ``tests/cpp/cuda_emulation`` and run

- ``fibres``: one CUDA thread after the other, in forward, reverse and random order between two barriers,
- ``addresses``: the same under AddressSanitizer and UndefinedBehaviorSanitizer, which also sees misaligned accesses,
- ``threads``: every CUDA thread as one of the operating system, under ThreadSanitizer.

It needs a C++ compiler that has the sanitizers, and ninja; it builds what changed, in ``build/emulated_cuda``.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from toolchain import find_compiler, find_ninja

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
MODES = {
    "fibres": [],
    "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "threads": ["-fsanitize=thread", "-DDIFFUPOSE_EMULATE_THREADS"],
}
# How each mode is run, by the values of DIFFUPOSE_EMULATION_ORDER.
ORDERS = {"fibres": ("forward", "reverse", "random"), "addresses": ("random",), "threads": ("forward",)}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
EMULATION = "tests/cpp/cuda_emulation"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of the cases came to.

    Args:
        reason: ``""`` if they passed, else what is wrong in a word or two.
        output: What was printed.
        seconds: How long it took.
    """

    reason: str
    output: str
    seconds: float


class Workspace:
    """A copy of the sources with a program for each mode, built where something changed.

    Args:
        folder: Where it lies.
        root: Where the sources are.
        sources: Folder of the kernels, from the root.
        cases: Folder of the cases, from the root.
    """

    def __init__(
        self, folder: Path, root: Path = ROOT, sources: str = "csrc", cases: str = "tests/cpp/cuda_cases"
    ) -> None:
        self.folder, self.root, self.sources, self.cases = folder.resolve(), root, sources, cases
        self.compiler, self.ninja = find_compiler(), find_ninja()
        if not self.compiler or not self.ninja:
            raise SystemExit("emulate_cuda needs a C++ compiler and ninja")

    def update(self) -> None:
        """Copy what changed, remove what is gone, and write the build file."""
        for tree in ("csrc", "tests/cpp"):
            copy_changed(self.root / tree, self.folder / tree)
        text = self._build_file()
        path = self.folder / "build.ninja"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")

    def _glob(self, folder: str, pattern: str) -> list[str]:
        found = sorted((self.folder / folder).rglob(pattern))
        return [path.relative_to(self.folder).as_posix() for path in found]

    def _build_file(self) -> str:
        includes = ["-I", "csrc", "-I", "tests/cpp", "-I", EMULATION]
        lines = [
            "rule compile",
            f"  command = {shlex.join([*self.compiler, *FLAGS, *includes])} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join([*self.compiler, '-pthread'])} $flags $in -o $out",
        ]
        # The C++ code that cases compare with is compiled once, without a sanitizer and for any processor.
        plain = self._glob("csrc", "*.cpp") if self.sources == "csrc" else []
        plain = [name for name in plain if not name.startswith("csrc/bind/") and not name.endswith("_cuda.cpp")]
        for name in plain:
            defines = "-DDIFFUPOSE_ISA=portable" if name.endswith("_isa.cpp") else '-DDIFFUPOSE_SOURCE_HASH=\\"\\"'
            lines += [f"build plain/{name}.o: compile {name}", f"  flags = -fvisibility=hidden {defines}"]
        for mode, flags in MODES.items():
            tested = [*self._glob(self.sources, "*.cu"), *self._glob(self.sources, "*_cuda.cpp")]
            tested = [name for name in tested if not name.startswith("csrc/bind/")]
            tested += self._glob(self.cases, "*.cpp")
            tested += [*self._glob(EMULATION, "*.cpp"), "tests/cpp/cuda_kernels.cpp"]
            for name in tested:
                language = "-x c++ " if name.endswith(".cu") else ""
                lines += [f"build {mode}/{name}.o: compile {name}", f"  flags = {language}{shlex.join(flags)}"]
            objects = [*(f"{mode}/{name}.o" for name in tested), *(f"plain/{name}.o" for name in plain)]
            lines += [f"build {mode}/run: link {' '.join(objects)}", f"  flags = {shlex.join(flags)}"]
        return "\n".join(lines) + "\n"

    def build(self, modes: Iterable[str], jobs: int | None = None) -> Outcome:
        """Build the programs of some modes."""
        command = [*self.ninja, *([f"-j{jobs}"] if jobs else []), *(f"{mode}/run" for mode in modes)]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        reason = "does not compile" if done.returncode else ""
        return Outcome(reason, done.stdout + done.stderr, time.monotonic() - begin)

    def run(self, mode: str, order: str, cases: Sequence[str] = (), timeout: float | None = None) -> Outcome:
        """Run the program of a mode in one order."""
        environment = {**os.environ, **SANITIZER_OPTIONS, "DIFFUPOSE_EMULATION_ORDER": order}
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [str(self.folder / mode / "run"), *cases],
                cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome("no end", "", time.monotonic() - begin)
        output = done.stdout + done.stderr
        return Outcome(reason_of(output) if done.returncode else "", output, time.monotonic() - begin)

    def dependencies(self, mode: str) -> dict[str, set[str]]:
        """Return which files each compiled source includes, itself among them, as the last build found them."""
        listed = subprocess.run(
            [*self.ninja, "-t", "deps"], cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout
        found = {}
        for entry in listed.split("\n\n"):
            name, *files = entry.split("\n")
            if name.startswith(f"{mode}/"):
                found[name.split(":")[0].removeprefix(f"{mode}/").removesuffix(".o")] = {file.strip() for file in files}
        return found

    def launched(self) -> dict[str, dict[str, set[str]]]:
        """Return which files and kernels each case launches: ``{case: {file: {kernel, ...}}}``."""
        outcome = self.run("fibres", "forward")
        if outcome.reason:
            raise SystemExit(f"the cases fail as they are:\n{outcome.output}")
        found: dict[str, dict[str, set[str]]] = {}
        for line in outcome.output.splitlines():
            if line.startswith("launched "):
                _, case, file, _, _, kernel = line.split(maxsplit=5)
                found.setdefault(case, {}).setdefault(file, set()).add(kernel)
        return found


def copy_changed(source: Path, target: Path) -> None:
    """Make a folder hold what another one does; files that are equal keep their time."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else []:
        if path.relative_to(target) not in wanted:
            path.unlink()
    for name in wanted:
        if not (target / name).is_file() or not filecmp.cmp(source / name, target / name, shallow=False):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def reason_of(output: str) -> str:
    """Return in a word or two why a run failed."""
    for text, reason in (
        ("ThreadSanitizer: data race", "race"),
        ("ThreadSanitizer", "thread sanitizer"),
        ("AddressSanitizer", "address"),
        ("runtime error: ", "undefined behaviour"),
        ("CUDA emulation: a barrier is not reached", "deadlock"),
        ("CUDA emulation: ", "misuse"),
        ("FAILED ", "wrong result"),
    ):
        if text in output:
            return reason
    return "crash"


def main() -> int:
    """Build and run every mode; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="names of cases; all without one")
    parser.add_argument("--mode", choices=MODES, action="append", help="run this mode only (may be given again)")
    arguments = parser.parse_args()
    workspace = Workspace(ROOT / "build" / "emulated_cuda" / "base")
    workspace.update()
    built = workspace.build(arguments.mode or MODES)
    if built.reason:
        print(built.output, file=sys.stderr)
        return 1
    failures = count = 0
    for mode in arguments.mode or MODES:
        for order in ORDERS[mode]:
            outcome = workspace.run(mode, order, arguments.case)
            print(f"{mode:<10} {order:<8} {outcome.reason or 'passed':<20} {outcome.seconds:6.1f} s", flush=True)
            if outcome.reason:
                print(outcome.output, file=sys.stderr)
            failures += bool(outcome.reason)
            count += 1
    print(f"emulated CUDA: {count - failures} runs passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
