"""``dipguard list``: victims and defences by name, with their options."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from dipguard.config import GROUPS, names_of
from dipguard.registry import REQUIRED, lookup, options_of


def run(args: argparse.Namespace) -> int:
    """Print both tables; return the exit code."""
    print("victims (--victim NAME, --victim-option KEY=VALUE):")
    _print_table(names_of("victim"), hidden=("weights",))
    print("\ndefences (--defense NAME, --option KEY=VALUE):")
    _print_table(names_of("defense"), hidden=GROUPS["defense"].hidden)
    return 0


def _print_table(table: Mapping[str, str], *, hidden: Collection[str]) -> None:
    for name, path in table.items():
        summary = (inspect.getdoc(lookup(table, name, argument="name")) or "").partition("\n")[0]
        options = [_option(key, default) for key, default in options_of(path).items() if key not in hidden]
        print(f"  {name}: {_plain(summary)}\n" + (f"      {' '.join(options)}\n" if options else ""))


def _plain(text: str) -> str:
    """A docstring without its markup."""
    return re.sub(r"(?::\w+:)?`+~?([^`]*)`+", lambda found: found[1].rpartition(".")[2] or found[1], text)


def _option(key: str, default: Any) -> str:
    """An option as it is typed, with its default."""
    if default == REQUIRED:
        return f"{key}={key.upper()}"
    return f"{key}={default if isinstance(default, str) else json.dumps(default, separators=(',', ':'))}"
