"""The two errors of diffupose that are not plain ``ValueError`` or ``OSError``, and a check that raises."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """A file or an array does not hold what was expected; the message names it, the expectation and what came."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ``ValueError`` unless the value of a setting is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
