"""``dipguard list``: the victims and the defences by name, with their options."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Collection
from typing import Any

from dipguard.defenses import DEFENSES
from dipguard.registry import resolve
from dipguard.victims import VICTIMS


def run(args: argparse.Namespace) -> int:
    """Print both tables; return the exit code."""
    print("victims (--victim NAME, --victim-option KEY=VALUE):")
    for name, (where, fixed) in VICTIMS.items():
        print(_entry(name, resolve({name: where}, name, argument="victim"), hidden=("weights", *fixed)))
    print("\ndefences (--defense NAME, --option KEY=VALUE):")
    for name in DEFENSES:
        print(_entry(name, resolve(DEFENSES, name, argument="defense"), hidden=("seed", "progress")))
    return 0


def _entry(name: str, function: Callable[..., Any], *, hidden: Collection[str]) -> str:
    parameters = inspect.signature(function).parameters.values()
    options = [f"{p.name}={p.default!r}" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    return f"  {name}: {first}\n" + (f"      {' '.join(options)}\n" if options else "")
