"""Show that every barrier is tested: ``python tools/mutate_barriers.py [FILE ...]``.

Removes one ``__syncthreads()``, ``__syncwarp()`` or other barrier of the .cu and .cuh files at a time. Then it runs the
cases of ``tools/emulate_cuda.py`` that launch a kernel of the file, until one of the modes fails and prints the reason:
a wrong result in some order of the threads, a race under ThreadSanitizer, or a barrier that is not reached. The build
folder keeps the results, so an interrupted run can be continued as long as no source changes.

Exit status: 0 if every barrier was caught, 1 if one was missed, 2 if ``--budget`` ran out before all were tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when it is imported by its path

from emulate_cuda import ROOT, Workspace

# How the sources spell what orders threads. Wrappers around PTX must be added here.
BARRIER = re.compile(
    r"(?<![\w:])(?:__sync(?:threads|warp)|(?:sync|arrive_at)_barrier|sync_cluster|wait_for_mail)\s*\((?:[^()]|\([^()]*\))*\)(?!\s*\{)"
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# The cheapest first. Threads are compiled only for barriers that the fibres do not catch.
STEPS = (("fibres", "forward"), ("fibres", "reverse"), ("fibres", "random"), ("threads", "forward"))


@dataclasses.dataclass(frozen=True)
class Barrier:
    """One barrier of a source file.

    Args:
        file: From the root.
        line: Counted from 1.
        begin, end: Its range in the file's text.
        text: The source code of it.
    """

    file: str
    line: int
    begin: int
    end: int
    text: str

    @property
    def name(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


def barriers_of(root: Path, sources: str) -> list[Barrier]:
    """Return the barriers of all .cu and .cuh files below a folder, without those in comments."""
    found = []
    for path in sorted((root / sources).rglob("*.cu*")):
        text = path.read_text(encoding="utf-8")
        code = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
        for match in BARRIER.finditer(code):
            line = text.count("\n", 0, match.start()) + 1
            name = path.relative_to(root).as_posix()
            found.append(Barrier(name, line, match.start(), match.end(), match.group()))
    return found


class Mutants:
    """Workspaces, one for each job, in which barriers are removed.

    Args:
        folder: Holds the workspaces and the results.
        root: Where the sources are.
        sources: Folder of the kernels, from the root.
        cases: Folder of the cases, from the root.
        jobs: How many barriers are tried at a time.
    """

    def __init__(self, folder: Path, root: Path, sources: str, cases: str, jobs: int) -> None:
        self.root, self.record = root, folder / "barriers.json"
        self.workspaces = [Workspace(folder / f"job-{i}", root, sources, cases) for i in range(jobs)]
        first = self.workspaces[0]
        first.update()
        for mode, order in STEPS:
            outcome = first.build([mode])
            outcome = outcome if outcome.reason else first.run(mode, order)
            if outcome.reason:
                raise SystemExit(f"{mode}, {order}: the cases fail as they are:\n{outcome.output}")
        self.launched = first.launched()
        for workspace in self.workspaces[1:]:
            workspace.update()
            workspace.build(["fibres", "threads"])
        # Without the barrier a case may never end.
        self.timeout = 60 + 20 * sum(first.run(mode, order).seconds for mode, order in STEPS)
        self._state = self._hash()
        kept = json.loads(self.record.read_text()) if self.record.is_file() else {}
        self.found: dict[str, str] = kept["caught"] if kept.get("state") == self._state else {}
        self._lock = threading.Lock()

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for tree in ("csrc", "tests/cpp"):
            for path in sorted((self.root / tree).rglob("*")):
                if path.is_file():
                    digest.update(path.relative_to(self.root).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()

    def cases_of(self, workspace: Workspace, file: str) -> list[str]:
        """Return the cases that launch a kernel of a file, or of a file that includes it."""
        users = {name for name, used in workspace.dependencies("fibres").items() if file in used}
        return [case for case, files in self.launched.items() if users & files.keys()]

    def try_barrier(self, workspace: Workspace, barrier: Barrier) -> str:
        """Return what fails without a barrier, ``""`` if nothing does."""
        path = workspace.folder / barrier.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: barrier.begin] + "((void)0)" + text[barrier.end :], encoding="utf-8")
        try:
            cases = self.cases_of(workspace, barrier.file)
            for mode, order in STEPS if cases else ():
                if (built := workspace.build([mode], jobs=1)).reason:
                    raise SystemExit(f"{barrier.name}: does not compile without the barrier:\n{built.output}")
                outcome = workspace.run(mode, order, cases, self.timeout)
                if outcome.reason:
                    return f"{mode} {order}: {outcome.reason}" if mode == "fibres" else f"{mode}: {outcome.reason}"
            return ""
        finally:
            path.write_text(text, encoding="utf-8")

    def keep(self, barrier: Barrier, caught: str) -> None:
        """Record a result in the file at once."""
        with self._lock:
            self.found[f"{barrier.file}:{barrier.begin}"] = caught
            partial = self.record.with_suffix(".part")
            partial.write_text(json.dumps({"state": self._state, "caught": self.found}, indent=1) + "\n")
            partial.replace(self.record)

    def run(self, barriers: list[Barrier], deadline: float) -> Iterator[tuple[Barrier, str | None]]:
        """Yield each barrier with what caught it: ``""`` if nothing did, None if there was no time."""
        waiting: queue.SimpleQueue[Barrier] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[Barrier, str | None] | BaseException] = queue.SimpleQueue()
        for barrier in barriers:
            waiting.put(barrier)

        def work(workspace: Workspace) -> None:
            while True:
                try:
                    barrier = waiting.get_nowait()
                except queue.Empty:
                    return
                caught = self.found.get(f"{barrier.file}:{barrier.begin}")
                try:
                    if caught is None and time.monotonic() < deadline:
                        caught = self.try_barrier(workspace, barrier)
                        self.keep(barrier, caught)
                except BaseException as error:
                    results.put(error)
                    return
                results.put((barrier, caught))

        for workspace in self.workspaces:
            threading.Thread(target=work, args=(workspace,), daemon=True).start()
        for _ in barriers:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result


def main(argv: list[str] | None = None) -> int:
    """Try the barriers and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*", help="only files whose path contains this")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the sources are")
    parser.add_argument("--sources", default="csrc", help="folder of the kernels, from the root")
    parser.add_argument("--cases", default="tests/cpp/cuda_cases", help="folder of the cases, from the root")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "emulated_cuda" / "mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="barriers at a time")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin none after this")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    barriers = barriers_of(arguments.root, arguments.sources)
    barriers = [b for b in barriers if not arguments.file or any(part in b.file for part in arguments.file)]
    if not barriers:
        print("no barriers")
        return 0
    jobs = min(arguments.jobs, len(barriers))
    mutants = Mutants(arguments.build, arguments.root, arguments.sources, arguments.cases, jobs)
    counts = {"caught": 0, "missed": 0, "not tried": 0}
    for barrier, caught in mutants.run(barriers, begin + arguments.budget):
        verdict = "not tried" if caught is None else "caught" if caught else "missed"
        counts[verdict] += 1
        print(f"{barrier.name:<60} {barrier.text:<18} {caught or verdict.upper()}", flush=True)
    seconds = time.monotonic() - begin
    print(f"barriers: {', '.join(f'{count} {name}' for name, count in counts.items())}, {seconds:.0f} s")
    return 1 if counts["missed"] else 2 if counts["not tried"] else 0


if __name__ == "__main__":
    sys.exit(main())
