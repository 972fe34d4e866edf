"""Measure and prune a store: ``python -m dipguard.store FOLDER [--older-than DAYS] [--max-gib SIZE]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from dipguard.checks import check_float
from dipguard.store.folder import LAYERS

DAY = 24 * 3600.0
LEFT_OVER = 3600.0
"""Seconds after which a temporary file counts as left behind by a killed process."""


def store_size(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Number of entries and bytes of each layer of a store; FileNotFoundError if there is no such folder."""
    sizes = {layer: [path.stat().st_size for path in _files(folder, layer)] for layer in LAYERS}
    return {layer: (len(files), sum(files)) for layer, files in sizes.items()}


def prune(folder: str | Path, *, older_than: float | None = None, max_gib: float | None = None) -> list[Path]:
    """Remove entries, temporary files of killed processes and free locks.

    Removes what was last used more than ``older_than`` days ago, then the least recently used entries until ``max_gib``
    GiB are left, and returns the removed entries. Processes that use the store at the same time are not disturbed: they
    make again what they miss. FileNotFoundError if there is no such folder, TypeError or ValueError for an argument out
    of range.
    """
    days = float("inf") if older_than is None else check_float(older_than, name="older_than", low=0.0)
    most = float("inf") if max_gib is None else check_float(max_gib, name="max_gib", low=0.0) * 2**30
    stats = {path: path.stat() for layer in LAYERS for path in _files(folder, layer)}
    gone, total, before = [], 0, time.time() - days * DAY
    for path in sorted(stats, key=lambda path: (stats[path].st_mtime, path), reverse=True):
        kept = total + stats[path].st_size
        if stats[path].st_mtime < before or kept > most:
            gone.append(path)
        else:
            total = kept
    begun = [path for layer in LAYERS for path in _files(folder, layer, ".*.part")]
    for path in [*gone, *(path for path in begun if time.time() - path.stat().st_mtime > LEFT_OVER)]:
        path.unlink(missing_ok=True)
    for path in Path(folder).expanduser().glob("locks/*.lock"):
        try:
            with FileLock(path).acquire(timeout=0):
                # A process that waits for this lock notices that the file is gone, and takes a new one.
                path.unlink(missing_ok=True)
        except (Timeout, OSError):
            continue
    return gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Prune a store as asked, and print its size; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dipguard.store", description="Measure and prune a store.")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="remove what was last used longer ago")
    parser.add_argument("--max-gib", type=float, metavar="SIZE", help="cut to so many GiB, the oldest entries first")
    asked = parser.parse_args(arguments)
    try:
        if asked.older_than is not None or asked.max_gib is not None:
            gone = prune(asked.folder, older_than=asked.older_than, max_gib=asked.max_gib)
            print(f"{len(gone)} entries removed")
        for layer, (count, size) in store_size(asked.folder).items():
            print(f"{layer:8} {count:7d} entries {size / 2**20:10.1f} MiB")
    except (FileNotFoundError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _files(folder: str | Path, layer: str, pattern: str = "*.npz") -> list[Path]:
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` must be a store, got {root}, which is no folder")
    return list((root / layer).glob(f"??/{pattern}"))
