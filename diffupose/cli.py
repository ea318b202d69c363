"""The ``diffupose`` command: lift, train, evaluate, env."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from diffupose import __version__
from diffupose.commands import evaluate, lift, train
from diffupose.errors import BackendUnavailableError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="diffupose", description="One 2D human pose in, many plausible 3D poses out.")
    parser.add_argument("--version", action="version", version=f"diffupose {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    lift.add_parser(commands)
    train.add_parser(commands)
    evaluate.add_parser(commands)
    env = commands.add_parser("env", help="print versions, backends, and why one is not active")
    env.set_defaults(run=_run_env)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after printing one line that says what is wrong with the input."""
    options = make_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except (ValueError, OSError, BackendUnavailableError, FloatingPointError) as error:
        print(f"diffupose: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffupose: interrupted", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"diffupose: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run_env(_: argparse.Namespace) -> None:
    from diffupose.env import format_environment

    print(format_environment())


if __name__ == "__main__":
    sys.exit(main())
