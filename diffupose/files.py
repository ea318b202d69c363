"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    The temporary name keeps the suffix, because writers such as ``numpy.savez`` and matplotlib choose by it. The data
    is flushed to disk before the rename, so that a power cut leaves the old file or the new one. Where ``path`` is a
    link, what it leads to is replaced.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        IsADirectoryError: If ``path`` ends like a folder.
        OSError: If ``path`` is a device or a pipe, which a rename would replace.
    """
    _refuse_folder_name(path)
    target = _behind_links(path)
    _refuse_special(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} does not exist")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        # The caller does not know the temporary file's name.
        if error.errno is not None and error.filename is not None and Path(error.filename) == temporary:
            raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_output(
    path: str | os.PathLike[str],
    name: str,
    others: Mapping[str, str | os.PathLike[str] | None] | None = None,
    suffixes: Sequence[str] = (),
) -> None:
    """Refuse an output that cannot be written or that is needed, before the work that fills it.

    Args:
        path: File to be written.
        name: Option that it comes from, for the message.
        others: Other inputs and outputs by option; None is one that was not given.
        suffixes: The endings that are allowed, in lower case; none given allows all.

    Raises:
        OSError: If its folder does not exist or may not be written to, or the path is a folder, a device or a pipe.
        ValueError: If it is one of the others, or ends otherwise.
    """
    for other_name, other in (others or {}).items():
        if other is not None and _same_file(path, other):
            raise ValueError(f"{name} must not be {other_name}, got {os.fspath(path)!r}")
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{name} must end in {', '.join(suffixes)}, got {os.fspath(path)!r}")
    target = _behind_links(path)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"{name}: {str(target)!r} is a folder")
    try:
        _refuse_folder_name(path)
        _refuse_special(target)
    except OSError as error:
        raise type(error)(f"{name}: {error}") from None
    if not os.access(target.absolute().parent, os.W_OK):
        raise PermissionError(f"{name}: the folder {str(target.parent)!r} may not be written to")
    try:
        # Permissions are not enough: /sys takes files from nobody.
        with tempfile.TemporaryFile(dir=target.absolute().parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{name}: the folder {str(target.parent)!r} takes no files: {reason}") from None


def _refuse_folder_name(path: str | os.PathLike[str]) -> None:
    # pathlib drops the last slash: it takes "poses.npz/" for "poses.npz".
    if os.path.basename(path) in ("", ".", ".."):
        raise IsADirectoryError(f"{os.fspath(path)!r} is the name of a folder, not of a file")


def _behind_links(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _refuse_special(target: Path) -> None:
    if target.exists() and not target.is_file() and not target.is_dir():
        raise OSError(f"{str(target)!r} is a device or a pipe, not a file")


def _same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(first, second)  # hard links, too
    except OSError:  # one of them is not there yet
        return os.path.realpath(first) == os.path.realpath(second)
