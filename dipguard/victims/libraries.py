"""Libraries that only some victims need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def library(module: str, *, victim: str, extra: str) -> Any:
    """Import ``module`` for the victim called ``victim``.

    Raises:
        ImportError: it is not installed; the message says how to get it (``dipguard[extra]``).
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the victim {victim!r} needs {module}, which could not be imported ({error}): "
            f"pip install 'dipguard[{extra}]'"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that follows in further lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
