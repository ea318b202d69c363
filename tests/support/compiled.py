"""What tests compile, kept by the content of its sources, for this run and later ones.

``DIFFUPOSE_TEST_CACHE`` names the folder; ``.pytest_cache/compiled`` is the default. Processes may share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Return where compiled files are kept."""
    return Path(os.environ.get("DIFFUPOSE_TEST_CACHE") or ROOT / ".pytest_cache" / "compiled")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time work on ``path``; the lock lies beside it and ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def machine(alone: bool) -> Iterator[None]:
    """Run beside others that are not alone, or alone: then others wait."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "machine.lock", "w", encoding="utf-8") as file:
        # Who waits to be alone holds this door, so that nobody new comes in meanwhile.
        with locked(folder / "door"):
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def content_hash(sources: Iterable[Path], *facts: str) -> str:
    """Return a hash of files, of their names below the root, and of what else the result depends on."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(fact.encode() + b"\0")
    for path in sorted(sources):
        name, content = path.relative_to(ROOT).as_posix(), path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def files_below(*folders: str) -> list[Path]:
    """Return all files of folders, which are named from the root."""
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def compiled_once(name: str, content: str, compile_to: Callable[[Path], object]) -> Path:
    """Return the file for this content; where it is missing, ``compile_to`` writes it.

    Args:
        name: The file's name.
        content: A hash of all that it depends on.
        compile_to: Gets the path to write to. It runs in one process at a time, and the file appears only when whole.
    """
    path = cache_folder() / content / name
    if path.is_file():
        return path
    with locked(cache_folder() / name):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.partial")
            compile_to(partial)
            partial.replace(path)
    return path
