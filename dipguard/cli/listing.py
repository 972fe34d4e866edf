"""``dipguard list``: victims and defences by name, with their options."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Collection, Mapping

from dipguard.defenses import DEFENSES
from dipguard.registry import lookup, options_of, table_of
from dipguard.victims import VICTIMS


def run(args: argparse.Namespace) -> int:
    """Print both tables; return the exit code."""
    print("victims (--victim NAME, --victim-option KEY=VALUE):")
    _print_table(table_of("victims", VICTIMS), hidden=("weights",))
    print("\ndefences (--defense NAME, --option KEY=VALUE):")
    _print_table(table_of("defenses", DEFENSES), hidden=("seed", "progress"))
    return 0


def _print_table(table: Mapping[str, str], *, hidden: Collection[str]) -> None:
    for name, path in table.items():
        summary = (inspect.getdoc(lookup(table, name, argument="name")) or "").partition("\n")[0]
        options = [f"{key}={default!r}" for key, default in options_of(path).items() if key not in hidden]
        print(f"  {name}: {summary}\n" + (f"      {' '.join(options)}\n" if options else ""))
