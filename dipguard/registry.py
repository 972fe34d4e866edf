"""A table of names and the code behind them, imported only when a name is asked for.

Data sets, victims and attacks are each such a table: a new one is a new file and a new row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from dipguard.checks import check_choice


def resolve(table: Mapping[str, str], name: str, *, argument: str) -> Callable[..., Any]:
    """Return the function or class that ``table[name]`` ("package.module:attribute") points to.

    Raises:
        ValueError: ``name`` is not in the table; the message lists what is.
    """
    module, attribute = table[check_choice(name, table, name=argument)].split(":")
    return getattr(import_module(module), attribute)


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], *, owner: str, hidden: Collection[str] = ()
) -> None:
    """Raise TypeError if ``options`` holds a name that is no keyword-only parameter of ``function``, or a hidden one.

    ``hidden`` are the parameters that the caller fills in itself; the message lists the others.
    """
    parameters = inspect.signature(function).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(allowed) or "none"
        raise TypeError(f"{owner} takes no option {', '.join(map(repr, unknown))}; its options are: {known}")
