"""Printing that cannot fail: a command's messages matter less than its files."""

from __future__ import annotations

import contextlib
import os
import sys


def say(text: str) -> None:
    """Print a line to standard output, at once.

    Characters that its encoding lacks are written as escapes. If the reader goes away (``| head -1``), messages stop
    and the work goes on. A full disk does the same, with a warning on standard error.
    """
    stream = sys.stdout
    if stream is None:  # closed by the caller (``>&-``)
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"diffupose: warning: standard output failed: {error.strerror or error}", file=sys.stderr)
        # The rest of the buffer must not fail again when Python ends.
        with open(os.devnull, "wb") as sink, contextlib.suppress(OSError):
            os.dup2(sink.fileno(), stream.fileno())
