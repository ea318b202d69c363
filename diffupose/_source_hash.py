"""One number for the C++ sources: compiled into the extension by ``setup.py`` and compared with the files at import.

It is read by ``setup.py`` too, which must run without torch, hence a module of its own that needs nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(csrc: Path) -> str:
    """Return a hash of the names and contents of all C++ and CUDA sources and headers under the folder ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        # A checkout may carry Windows line ends: the same sources all the same.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]
