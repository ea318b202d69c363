"""A hash of the C++ sources: ``setup.py`` compiles it into the extension, and an import compares it with the files.

``setup.py`` loads this file and must run without torch, so this module imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(csrc: Path) -> str:
    """Return a hash of the names and contents of all C++ and CUDA sources and headers under the folder ``csrc``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        # Windows line ends do not change the hash.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]
