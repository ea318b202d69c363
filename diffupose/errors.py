"""The two errors of diffupose that are not plain ``ValueError`` or ``OSError``."""


class InputError(ValueError):
    """A file or an array does not hold what was expected; the message names it, the expectation and what came."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
