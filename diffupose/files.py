"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    The temporary name keeps the suffix, because writers such as ``numpy.savez`` and matplotlib choose by it. The data
    is flushed to disk before the rename, so that a power cut leaves the old file or the new one.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} does not exist")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a file that could not be written, before the work that fills it.

    Args:
        path: File to be written.
        name: Option that it comes from, for the message.

    Raises:
        OSError: If its folder does not exist or may not be written to, or the path is a folder.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"{name}: {str(target)!r} is a folder")
    if not os.access(target.absolute().parent, os.W_OK):
        raise PermissionError(f"{name}: the folder {str(target.parent)!r} may not be written to")
