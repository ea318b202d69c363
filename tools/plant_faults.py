"""Show that the tests find faults: ``python tools/plant_faults.py [--only REGEX] [--select fast]``.

Each entry of ``tools/faults.toml`` changes one place of the code: a sign, an index, a dropped term. The tool clones the
repository into a temporary folder, installs the clone, plants one fault at a time and runs tests until one fails:

1. the tests that the entry names, those that ``make test`` runs first, then the slow ones, then its commands;
2. with ``--select fast`` everything that ``make test`` runs, where none of the first did;
3. with ``--select all`` the slow tests and the emulated CUDA kernels, too.

Before that the named tests must pass without a fault. The working tree stays as it is: what is tested is a commit.

Exit status: 0 if every fault was caught, 1 if one was missed or is no fault (it does not compile, say), 2 for a fault
whose place is not in the code any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tools" / "faults.toml"
SECONDS = 3600  # a run of tests that takes longer never ends
EMULATED = "tools/emulate_cuda.py --mode fibres"
PYTEST = "pytest -x -q -p no:cacheprovider"
# Runs pytest in a process forked for each line of its input: what every run imports is imported once.
SERVER = """
import json, os, signal, sys
import pytest, torch
for line in sys.stdin:
    arguments, environment, output, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        signal.alarm(seconds)
        for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, output, os.O_WRONLY)):
            os.dup2(os.open(path, flags | os.O_APPEND), stream)
        code = int(pytest.main(arguments))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CAUGHT_BY = {"fast": "make test", "slow": "slow tests", "command": "a command"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one place of the code that a test should notice.

    Args:
        name: Unique; says what is wrong.
        file: From the root.
        find: Text that stands once in the file.
        replace: What takes its place.
        tests: Node ids or files that are most likely to notice.
        commands: Other scripts with their arguments, from the root.
        interpreted: Whether the tests run in Triton's interpreter.
    """

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    interpreted: bool = False

    def problem(self, root: Path) -> str:
        """Return why the fault cannot be planted, ``""`` if it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.name}: there is no {self.file}"
        count = path.read_text(encoding="utf-8").count(self.find)
        if count != 1:
            return f"{self.name}: {self.file} holds {self.find!r} {count} times"
        for name in (*self.tests, *(command.split()[0] for command in self.commands)):
            file, _, function = name.partition("::")
            if not (root / file).exists() or (function and f"def {function}(" not in (root / file).read_text()):
                return f"{self.name}: there is no {name}"
        return ""


def load_faults(path: Path) -> list[Fault]:
    """Return the entries of a list of faults."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    faults = [Fault(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) for entry in entries]
    if len({fault.name for fault in faults}) < len(faults):
        raise SystemExit(f"{path}: names must be unique")
    return faults


class Copy:
    """A clone of the repository with an environment of its own, in which one fault at a time stands.

    Args:
        folder: Where it lies; one that is there already is used again.
        revision: What is tested.
        workers: Processes of a run of many tests; needs pytest-xdist where it is above 1.
    """

    def __init__(self, folder: Path, revision: str, workers: int) -> None:
        self.tree, self.python, self.workers = folder / "tree", folder / "venv" / "bin" / "python", workers
        self.environment = os.environ | {"DIFFUPOSE_BUILD": "cpu"}
        self.environment.pop("PYTHONPATH", None)
        clone = ["-C", self.tree, "fetch"] if self.tree.is_dir() else ["clone", "--no-checkout", ROOT, self.tree]
        subprocess.run(["git", *clone, "-q"], check=True)
        subprocess.run(["git", "-C", self.tree, "checkout", "-q", "--force", "--detach", revision], check=True)
        if not self.python.exists():
            # What is installed here is there, too; the package itself is the clone's.
            venv.create(folder / "venv", symlinks=True)
            site = next((folder / "venv").glob("lib/python*/site-packages"))
            (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
            pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps"]
            subprocess.run([*pip, "--no-build-isolation", "-e", self.tree], check=True, env=self.environment)
        self.build()
        self.server = subprocess.Popen(
            [self.python, "-c", SERVER], cwd=self.tree, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
        )  # fmt: skip

    def build(self) -> str:
        """Compile what changed and return what was printed where that fails."""
        code, output = self._command("setup.py build_ext --inplace")
        return output if code else ""

    def _command(self, arguments: str) -> tuple[int, str]:
        """Run a script; return its exit status and what it printed."""
        result = subprocess.run(
            [self.python, *shlex.split(arguments)], cwd=self.tree, env=self.environment, text=True, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout

    def _pytest(self, arguments: str, interpreted: bool) -> tuple[int, str]:
        output, environment = self.tree.parent / "output.txt", {"TRITON_INTERPRET": "1"} if interpreted else {}
        output.write_text("")
        print(json.dumps([shlex.split(arguments)[1:], environment, str(output), SECONDS]), file=self.server.stdin)
        code = int(self.server.stdout.readline())
        return 0 if code == 5 else code, output.read_text(encoding="utf-8", errors="replace")  # 5: no test selected

    def run(self, arguments: str, interpreted: bool = False) -> str:
        """Run a script or pytest; return what failed, ``""`` if nothing did.

        Raises:
            ValueError: If the code cannot be compiled or imported: that is no fault.
        """
        is_pytest = arguments.startswith("pytest")
        code, output = self._pytest(arguments, interpreted) if is_pytest else self._command(arguments)
        if "ninja: build stopped" in output or (is_pytest and code > 1):
            raise ValueError(output[-3000:])
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        last = (output.strip().splitlines() or [""])[-1]
        return "" if code == 0 else failed[0] if failed else f"exit status {code}: {last[:80]}"

    def check(self, faults: list[Fault]) -> str:
        """Run what the faults name without a fault; return what fails."""
        for interpreted in (False, True):
            tests = sorted({test for fault in faults if fault.interpreted == interpreted for test in fault.tests})
            if tests and (failed := self.run(shlex.join([*PYTEST.split(), *tests]), interpreted)):
                return failed
        commands = sorted({command for fault in faults for command in fault.commands})
        return next((failed for command in commands if (failed := self.run(command))), "")

    def steps(self, fault: Fault, select: str) -> list[tuple[str, str, bool]]:
        """Return what is run with a fault, one after the other: who calls it, the arguments, Triton's interpreter."""
        tests, many = shlex.join(fault.tests), f" -n {self.workers}" if self.workers > 1 else ""
        steps = []
        if tests:
            steps += [("fast", f'{PYTEST} -m "not slow" {tests}', fault.interpreted)]
            steps += [("slow", f"{PYTEST} -m slow {tests}", fault.interpreted)]
        steps += [("command", command, False) for command in fault.commands]
        if select in ("fast", "all"):
            steps.insert(1 if tests else 0, ("fast", f'{PYTEST}{many} -m "not slow"', False))
        if select == "all":
            steps += [("slow", f"{PYTEST}{many} -m slow", False), ("command", EMULATED, False)]
        return steps

    def plant(self, fault: Fault, select: str) -> dict[str, object]:
        """Plant a fault, run tests until one fails, and take it out again."""
        begin, path, kept = time.monotonic(), self.tree / fault.file, self.tree.parent / "build"
        verdict: dict[str, object] = {"file": fault.file, "caught": "", "by": ""}
        compiled = fault.file.startswith("csrc/")
        if compiled:  # objects without the fault, to be put back: nothing is compiled twice
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.tree / "build", kept, symlinks=True)
            libraries = {library: library.read_bytes() for library in (self.tree / "diffupose").glob("_C*.so")}
        old, times = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(old.replace(fault.find, fault.replace), encoding="utf-8")
        try:
            if compiled and (output := self.build()):
                raise ValueError(output[-3000:])
            for caller, arguments, interpreted in self.steps(fault, select):
                if failed := self.run(arguments, interpreted):
                    verdict |= {"caught": caller, "by": failed}
                    break
        except ValueError as error:
            verdict |= {"caught": "invalid", "by": str(error)}
        finally:
            path.write_text(old, encoding="utf-8")
            if compiled:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                shutil.rmtree(self.tree / "build")
                shutil.move(kept, self.tree / "build")
                for library, content in libraries.items():
                    library.write_bytes(content)
        return verdict | {"seconds": round(time.monotonic() - begin, 1)}


def table_of(results: dict[str, dict[str, object]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| fault | file | caught by | test |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        caught = str(result["caught"])
        who, by = CAUGHT_BY.get(caught, "**no fault**" if caught else "**nothing**"), str(result["by"])
        lines.append(f"| {name} | {result['file']} | {who} | {'' if caught == 'invalid' else by} |")
    return "\n".join(lines)


def run_all(faults: list[Fault], arguments: argparse.Namespace, results: dict[str, dict[str, object]]) -> None:
    """Plant the faults, whose results are kept at once."""
    lock, folder = threading.Lock(), arguments.workspace or Path(tempfile.mkdtemp(prefix="faults-"))
    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()

    def plant(fault: Fault) -> None:
        copy = copies.get()
        result = copy.plant(fault, arguments.select)
        copies.put(copy)
        with lock:
            results[fault.name] = result
            print(f"{fault.name:<60} {result['caught'] or 'MISSED':<8} {result['by']}"[:200], flush=True)
            if arguments.json:
                partial = arguments.json.with_suffix(".part")
                partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                partial.replace(arguments.json)

    try:
        git = ["git", "-C", str(ROOT), "rev-parse", arguments.tree]
        revision = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        first = Copy(folder / "job-0", revision, arguments.workers)
        if lost := [problem for fault in faults if (problem := fault.problem(first.tree))]:
            raise SystemExit("\n".join(lost))
        if not arguments.unchecked and (failed := first.check(faults)):
            raise SystemExit(f"fails without a fault: {failed}")
        copies.put(first)
        for job in range(1, arguments.jobs):
            copies.put(Copy(folder / f"job-{job}", revision, arguments.workers))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(plant, faults))
    finally:
        if arguments.workspace is None:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Plant the faults and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name or file this is found in")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--check", action="store_true", help="say which cannot be planted in the working tree, and end")
    parser.add_argument("--select", choices=("named", "fast", "all"), default="fast", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a clone of its own")
    parser.add_argument("--workers", type=int, default=1, help="processes of pytest where it runs many tests")
    parser.add_argument("--json", type=Path, help="keep results there; faults that have one are not run again")
    parser.add_argument("--tree", default="HEAD", metavar="REV", help="commit to test (default: %(default)s)")
    parser.add_argument("--faults", type=Path, default=FAULTS, help="list of faults (default: tools/faults.toml)")
    parser.add_argument("--workspace", type=Path, help="keep the clones there instead of in a temporary folder")
    parser.add_argument("--unchecked", action="store_true", help="do not run the named tests without a fault first")
    arguments = parser.parse_args(argv)
    faults = [f for f in load_faults(arguments.faults) if re.search(arguments.only, f"{f.name} {f.file}")]
    if arguments.list:
        print("\n".join(f"{fault.file:<55} {fault.name}" for fault in faults))
        return 0
    if arguments.check:
        problems = [problem for fault in faults if (problem := fault.problem(ROOT))]
        print("\n".join(problems) or f"{len(faults)} faults can be planted")
        return 2 if problems else 0
    results: dict[str, dict[str, object]] = {}
    if arguments.json and arguments.json.is_file():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
    if left := [fault for fault in faults if fault.name not in results]:
        run_all(left, arguments, results)
    wanted = {fault.name: results[fault.name] for fault in faults}
    print(table_of(wanted))
    counts = {what: sum(result["caught"] == what for result in wanted.values()) for what in (*CAUGHT_BY, "", "invalid")}
    words = {**CAUGHT_BY, "": "nothing", "invalid": "not a fault"}
    print(f"{len(wanted)} faults: " + ", ".join(f"{count} {words[what]}" for what, count in counts.items() if count))
    return 1 if counts[""] or counts["invalid"] else 0


if __name__ == "__main__":
    sys.exit(main())
