"""What lies in a store, how much of it, what may go, and whether it is whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dipguard.checks import check_choice, check_float, check_int
from dipguard.store.entry import DamagedEntryError, read_entry, read_header
from dipguard.store.folder import LAYERS
from dipguard.store.keys import versions

DAY = 24 * 3600.0
LEFT_OVER = 3600.0
"""Seconds after which a file that was being written is held to be that of a killed process."""


@dataclass(frozen=True)
class EntryInfo:
    """An entry, as its file's name, size, time and header tell.

    Attributes:
        path: Its file.
        layer: ``fits``, ``traces``, ``stopped`` or ``attacks``.
        key: The digest of what it depends on.
        bytes: Size of the file.
        used: When it was written or last read from its file, seconds since 1970.
        header: What it was made from; empty where the file is damaged.
    """

    path: Path
    layer: str
    key: str
    bytes: int
    used: float
    header: dict[str, Any]

    @property
    def damaged(self) -> bool:
        """Whether not even the header can be read; :func:`verify` reads the rest."""
        return not self.header

    @property
    def is_current(self) -> bool:
        """Whether the programs in use could have made it: the numbers' version, torch and torchmetrics."""
        made, now = self.header.get("versions", {}), versions()
        return all(made.get(name) == now[name] for name in ("numerics", "torch", "torchmetrics"))


def list_entries(folder: str | Path, *, layers: Sequence[str] = LAYERS) -> list[EntryInfo]:
    """All entries of a store, layer by layer, the least recently used first.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: An unknown layer, or a file instead of a folder.
    """
    root = _root(folder)
    found = []
    for layer in layers:
        check_choice(layer, LAYERS, name="layers")
        infos = [info for path in (root / layer).glob("??/*.npz") if (info := _info(path, layer)) is not None]
        found += sorted(infos, key=lambda info: (info.used, info.key))
    return found


def store_size(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Number of entries and bytes of each layer.

    Raises:
        FileNotFoundError, ValueError: As :func:`list_entries`.
    """
    root = _root(folder)
    sizes = {}
    for layer in LAYERS:
        files = [stat.st_size for path in (root / layer).glob("??/*.npz") if (stat := _stat(path)) is not None]
        sizes[layer] = (len(files), sum(files))
    return sizes


def prune(
    folder: str | Path,
    *,
    older_than: float | None = None,
    max_bytes: int | None = None,
    other_versions: bool = False,
    layers: Sequence[str] = LAYERS,
    dry_run: bool = False,
) -> list[EntryInfo]:
    """Remove entries; also what killed processes left half written, and locks that nobody holds.

    Processes that use the store meanwhile are not disturbed: what they miss, they make again.

    Args:
        folder: The store.
        older_than: Days since its last use after which an entry goes.
        max_bytes: Size to which the chosen layers are cut, the least recently used entries first.
        other_versions: Entries go that the programs in use would no longer ask for.
        layers: Where to look. The traces of a fit go on serving once it is gone, until another victim asks.
        dry_run: Remove nothing.

    Returns:
        The entries that went, or would go.

    Raises:
        FileNotFoundError, TypeError, ValueError: As :func:`list_entries`, or an argument is out of range.
    """
    if older_than is not None:
        check_float(older_than, name="older_than", low=0.0)
    if max_bytes is not None:
        check_int(max_bytes, name="max_bytes", low=0)
    entries = sorted(list_entries(folder, layers=layers), key=lambda info: info.used)
    before = None if older_than is None else time.time() - older_than * DAY
    gone = [
        info
        for info in entries
        if (before is not None and info.used < before) or (other_versions and not info.is_current)
    ]
    if max_bytes is not None:
        rest = [info for info in entries if info not in gone]
        excess = sum(info.bytes for info in rest) - max_bytes
        for info in rest:
            if excess <= 0:
                break
            gone.append(info)
            excess -= info.bytes
    if not dry_run:
        for info in gone:
            info.path.unlink(missing_ok=True)
        _sweep(_root(folder))
    return gone


def verify(folder: str | Path, *, remove: bool = False) -> list[EntryInfo]:
    """Read every entry and compare it with its digest; returns, and on demand removes, the damaged ones.

    Raises:
        FileNotFoundError, ValueError: As :func:`list_entries`.
    """
    damaged = []
    for info in list_entries(folder):
        try:
            sound = read_entry(info.path).header.get("key") == info.key
        except FileNotFoundError:  # removed meanwhile
            continue
        except (DamagedEntryError, OSError):
            sound = False
        if not sound:
            damaged.append(info)
            if remove:
                info.path.unlink(missing_ok=True)
    return damaged


def _root(folder: str | Path) -> Path:
    root = Path(folder).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"`folder` must be a store, got {root}, which does not exist")
    if not root.is_dir():
        raise ValueError(f"`folder` must be a store, got {root}, which is a file")
    return root


def _info(path: Path, layer: str) -> EntryInfo | None:
    stat = _stat(path)
    if stat is None:
        return None
    try:
        header = read_header(path)
    except FileNotFoundError:
        return None
    except DamagedEntryError:
        header = {}
    return EntryInfo(path, layer, path.stem, stat.st_size, stat.st_mtime, header)


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except FileNotFoundError:  # removed meanwhile
        return None


def _sweep(root: Path) -> None:
    """Remove temporary files of the dead, free locks and empty folders."""
    for path in _temporary(root):
        stat = _stat(path)
        if stat is not None and time.time() - stat.st_mtime > LEFT_OVER:
            path.unlink(missing_ok=True)
    for path in (root / "locks").glob("*.lock"):
        lock = FileLock(path)
        try:
            with lock.acquire(timeout=0):
                # Whoever waits for it sees that the file is gone, and takes a new one.
                path.unlink(missing_ok=True)
        except (Timeout, OSError):
            continue


def _temporary(root: Path) -> Iterator[Path]:
    for layer in LAYERS:
        yield from (root / layer).glob("??/.*.npz.*")
