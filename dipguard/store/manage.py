"""List, measure, prune and verify a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dipguard.checks import check_choice, check_float, check_int
from dipguard.store.entry import DamagedEntryError, read_entry, read_header
from dipguard.store.folder import LAYERS
from dipguard.store.keys import numerics

DAY = 24 * 3600.0
LEFT_OVER = 3600.0
"""Seconds after which a temporary file counts as left behind by a killed process."""


@dataclass(frozen=True)
class EntryInfo:
    """An entry, as its file's name, size, time and header tell.

    Attributes:
        path: Its file.
        layer: One of ``LAYERS``.
        key: The digest of everything that it depends on.
        bytes: Size of the file.
        used: When it was written or last read from its file, seconds since 1970.
        header: What it was made from; empty if it is damaged. :func:`verify` reads the rest of the file too.
    """

    path: Path
    layer: str
    key: str
    bytes: int
    used: float
    header: dict[str, Any]


def list_entries(folder: str | Path, *, layers: Sequence[str] = LAYERS) -> list[EntryInfo]:
    """All entries of a store, layer by layer, the least recently used first.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: An unknown layer, or a file instead of a folder.
    """
    found = []
    for layer in layers:
        check_choice(layer, LAYERS, name="layers")
        infos = [info for path in _files(folder, layer) if (info := _info(path, layer)) is not None]
        found += sorted(infos, key=lambda info: (info.used, info.key))
    return found


def store_size(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Number of entries and bytes of each layer; errors are those of :func:`list_entries`."""
    sizes = {layer: [path.stat().st_size for path in _files(folder, layer)] for layer in LAYERS}
    return {layer: (len(files), sum(files)) for layer, files in sizes.items()}


def prune(
    folder: str | Path,
    *,
    older_than: float | None = None,
    max_bytes: int | None = None,
    other_versions: bool = False,
    layers: Sequence[str] = LAYERS,
    dry_run: bool = False,
) -> list[EntryInfo]:
    """Remove entries, temporary files of killed processes and free locks.

    Processes that use the store at the same time are not disturbed: they make again what they miss.

    Args:
        folder: The store.
        older_than: Days since its last use after which an entry is removed.
        max_bytes: Size to which the chosen layers are cut, the least recently used entries first.
        other_versions: Remove entries made by other versions of dipguard's numerics, torch or torchmetrics.
        layers: Layers to prune. Traces remain usable without their fit, until another victim needs it.
        dry_run: Remove nothing.

    Returns:
        The entries that were removed, or would be.

    Raises:
        FileNotFoundError, TypeError, ValueError: See :func:`list_entries`, or an argument is out of range.
    """
    days = float("inf") if older_than is None else check_float(older_than, name="older_than", low=0.0)
    most = float("inf") if max_bytes is None else check_int(max_bytes, name="max_bytes", low=0)
    gone, total, before = [], 0, time.time() - days * DAY
    for info in sorted(list_entries(folder, layers=layers), key=lambda info: info.used, reverse=True):
        made = info.header.get("versions", {})
        if info.used < before or (other_versions and any(made.get(name) != now for name, now in numerics().items())):
            gone.append(info)
            continue
        total += info.bytes
        if total > most:
            gone.append(info)
    if not dry_run:
        for info in gone:
            info.path.unlink(missing_ok=True)
        _remove_left_overs(folder)
    return gone


def verify(folder: str | Path, *, remove: bool = False) -> list[EntryInfo]:
    """Read every entry and compare it with its checksum; return, and on demand remove, the damaged ones."""
    damaged = []
    for info in list_entries(folder):
        try:
            whole = read_entry(info.path).header.get("key") == info.key
        except FileNotFoundError:  # removed in the meantime
            continue
        except (DamagedEntryError, OSError):
            whole = False
        if not whole:
            damaged.append(info)
            if remove:
                info.path.unlink(missing_ok=True)
    return damaged


def _files(folder: str | Path, layer: str, pattern: str = "*.npz") -> list[Path]:
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "which is a file" if root.exists() else "which does not exist"
        raise (ValueError if root.exists() else FileNotFoundError)(f"`folder` must be a store, got {root}, {what}")
    return list((root / layer).glob(f"??/{pattern}"))


def _info(path: Path, layer: str) -> EntryInfo | None:
    try:
        stat = path.stat()
        header = read_header(path)
    except FileNotFoundError:  # removed in the meantime
        return None
    except DamagedEntryError:
        header = {}
    return EntryInfo(path, layer, path.stem, stat.st_size, stat.st_mtime, header)


def _remove_left_overs(folder: str | Path) -> None:
    for path in (path for layer in LAYERS for path in _files(folder, layer, ".*.npz.*")):
        if time.time() - path.stat().st_mtime > LEFT_OVER:
            path.unlink(missing_ok=True)
    for path in Path(folder).expanduser().glob("locks/*.lock"):
        try:
            with FileLock(path).acquire(timeout=0):
                # A process that waits for this lock notices that the file is gone, and takes a new one.
                path.unlink(missing_ok=True)
        except (Timeout, OSError):
            continue
