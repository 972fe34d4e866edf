"""The command line, and what the programs ``train.py`` and ``evaluate.py`` do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """The command cannot be carried out as given. The message is shown to the user without a traceback."""


@contextmanager
def command_errors(prefix: str = "") -> Iterator[None]:
    """Turn errors of arguments, files and missing libraries into a `CommandError`.

    Args:
        prefix: Put before the message, to name the part of the command line that it is about.
    """
    try:
        yield
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise CommandError(f"{prefix}{error}") from error
