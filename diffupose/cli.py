"""The ``diffupose`` command: lift, train, evaluate, calibrate, env."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

from diffupose._version import __version__
from diffupose.commands import calibrate, env, evaluate, lift, train
from diffupose.errors import BackendUnavailableError


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage; subparsers take its class."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser: argparse.ArgumentParser = _Parser(
        prog="diffupose", description="One 2D human pose in, many plausible 3D poses out."
    )
    parser.add_argument("--version", action="version", version=f"diffupose {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    lift.add_parser(commands)
    train.add_parser(commands)
    evaluate.add_parser(commands)
    calibrate.add_parser(commands)
    env.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after printing one line that says what is wrong with the input."""
    options = make_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(), _sigterm_as_exit():
            warnings.showwarning = _show_warning
            options.run(options)
    except (ValueError, OSError, BackendUnavailableError, FloatingPointError) as error:
        print(f"diffupose: error: {_one_line(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffupose: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into ``SystemExit``, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_line(error: Exception, options: argparse.Namespace) -> str:
    """Return the message in one line; an argument's name at its start becomes the flag."""
    message = " ".join(str(error).split()) or type(error).__name__
    first, space, rest = message.partition(" ")
    return f"--{first.replace('_', '-')}{space}{rest}" if first in vars(options) else message


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"diffupose: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
