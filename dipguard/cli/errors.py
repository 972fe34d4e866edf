"""A command that cannot be carried out as it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """The message is for the person at the command line, without a traceback."""


@contextmanager
def at_the_door(prefix: str = "") -> Iterator[None]:
    """Turn the errors of arguments, files and missing libraries into a `CommandError`.

    Args:
        prefix: Put before the message, to say which part of the command line it is about.
    """
    try:
        yield
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise CommandError(f"{prefix}{error}") from error
