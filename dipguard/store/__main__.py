"""The command line of a store: ``python -m dipguard.store {list,size,prune,verify} FOLDER``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence

from dipguard.store.folder import LAYERS
from dipguard.store.manage import EntryInfo, list_entries, prune, store_size, verify

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 1 if ``verify`` found damage, 2 for a bad argument."""
    parser = argparse.ArgumentParser(prog="python -m dipguard.store", description="Look after a store of results.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,size,prune,verify}")
    shown = commands.add_parser("list", help="every entry: layer, last use, size, key, what it is")
    shown.add_argument("--json", action="store_true", help="one JSON object a line, with the whole header")
    commands.add_parser("size", help="entries and bytes of each layer")
    cut = commands.add_parser("prune", help="remove entries, and what killed processes left behind")
    cut.add_argument("--older-than", type=float, metavar="DAYS", help="last used longer ago than this")
    cut.add_argument("--max-size", type=bytes_of, metavar="SIZE", help="cut to this size, such as 20G")
    cut.add_argument("--other-versions", action="store_true", help="made by programs other than those in use")
    cut.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    looked = commands.add_parser("verify", help="read every entry; exit code 1 if one is damaged")
    looked.add_argument("--remove", action="store_true", help="remove the damaged ones")
    for command in (shown, cut):
        command.add_argument(
            "--layer", action="append", dest="layers", choices=LAYERS, help="this layer alone; may be repeated"
        )
    for command in commands.choices.values():
        command.add_argument("folder", metavar="FOLDER")
    asked = parser.parse_args(arguments)
    try:
        return _run(asked)
    except (FileNotFoundError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace) -> int:
    folder, damaged = asked.folder, []
    if asked.command == "list":
        for info in list_entries(folder, layers=asked.layers or LAYERS):
            values = {"path": str(info.path), "bytes": info.bytes, "used": info.used, **info.header}
            print(json.dumps(values, sort_keys=True) if asked.json else _line(info))
    elif asked.command == "size":
        sizes = store_size(folder)
        sizes["all"] = (sum(count for count, _ in sizes.values()), sum(total for _, total in sizes.values()))
        for layer, (count, total) in sizes.items():
            print(f"{layer:8} {count:7d} entries {size_text(total):>10}")
    elif asked.command == "prune":
        gone = prune(
            folder,
            older_than=asked.older_than,
            max_bytes=asked.max_size,
            other_versions=asked.other_versions,
            layers=asked.layers or LAYERS,
            dry_run=asked.dry_run,
        )
        verb = "would be removed" if asked.dry_run else "removed"
        print(f"{len(gone)} entries {verb}, {size_text(sum(info.bytes for info in gone))}")
    else:
        damaged = verify(folder, remove=asked.remove)
        for info in damaged:
            print(f"damaged: {info.path}")
        print(f"{len(damaged)} damaged entries{' removed' if asked.remove else ''}")
    return 1 if damaged else 0


def _line(info: EntryInfo) -> str:
    when, about = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used)), info.header
    image = f"image {about['index']} {about['network']} " if "network" in about else ""
    what = f"{image}{about.get('what', '')}" if about else "damaged"
    return f"{info.layer:8} {when} {size_text(info.bytes):>10} {info.key} {what}"


def bytes_of(text: str) -> int:
    """A size such as 500M or 1.5G (units of 1024) in bytes.

    Raises:
        ValueError: It is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"a size must be a number with a unit K, M, G or T, such as 20G, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(count: float) -> str:
    """Bytes with a unit, such as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
