"""The two ways the package says no: what the caller asked is wrong, or it could not be done.

Messages are read by users of the command line, so they are Chinese and name the value, the limit
and the next step. The command line prints them as one line and exits with ``exit_code``; a bug
keeps its traceback.
"""


class PlugError(Exception):
    """What was asked could not be done: a broken file, a full disk, a run that cannot resume."""

    exit_code = 1


class UsageError(PlugError, ValueError):
    """What was asked makes no sense: a wrong value, an unknown name, a missing input."""

    exit_code = 2


class NonFiniteError(PlugError):
    """A model's outputs are NaN or infinite."""


def install(extra: str) -> str:
    """How to install an extra, for the end of a message: from an index, and from a clone."""
    return f'pip install "plug-zh[{extra}]"（在仓库的目录里是 pip install ".[{extra}]"）。'
