"""The store's folder: entries by layer and key, locks, and what was read a moment ago.

    fits/<ab>/<key>.npz      a fit as no victim has seen it: x(t), v(t) and the loss at the sampled steps
    traces/<ab>/<key>.npz    a fit as a victim saw it: decisions, on-boundary images, the last reconstructions
    stopped/<ab>/<key>.npz   what a stopping rule chose of a fit
    attacks/<ab>/<key>.npz   attacked images
    locks/<key>.lock         held while an entry is being made; the system frees it when its process dies

The key is the digest of all that an entry depends on, and of nothing else. Nothing in here is needed: what is missing,
damaged or of another version is made again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dipguard.store.entry import DamagedEntryError, Entry, read_entry, write_entry
from dipguard.store.keys import versions
from dipguard.store.lru import CACHE_BYTES, ByteLRU

_log = logging.getLogger(__name__)

LAYERS = ("fits", "traces", "stopped", "attacks")
POLL = 0.1
"""Seconds between two looks at a lock that another process holds."""

_opened: dict[tuple[Path, bool], TraceStore] = {}
_opening = threading.Lock()


class TraceStore:
    """Fits that are made once, for all processes that share a folder.

    Args:
        path: The folder; made when the first entry is written.
        keep_samples: Keep x(t) of all sampled steps (float32, 12 KiB a sample of 32x32 pixels). Without them an entry
            serves other tau, t0, K and beta, but another victim or other decisions need another fit.
        cache_bytes: Bound of the memory for entries read; each process has its own.

    Attributes:
        counts: What happened in this process, in images: ``fitted``, ``decided`` (from kept samples), ``replayed``
            (nothing but the stitch), ``attacked``, ``attacks_found``, and ``damaged`` entries.

    Raises:
        ValueError: ``path`` is there and is no folder.
    """

    def __init__(self, path: str | Path, *, keep_samples: bool = True, cache_bytes: int = CACHE_BYTES) -> None:
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`store` must be a folder, got {self.path}, which is a file")
        self.keep_samples = keep_samples
        self.cache = ByteLRU(cache_bytes)
        self.counts: Counter[str] = Counter()

    def file(self, layer: str, key: str) -> Path:
        """Where an entry is kept."""
        return self.path / layer / key[:2] / f"{key}.npz"

    def read(self, layer: str, key: str) -> Entry | None:
        """An entry from its file, or None where it is missing or, with a warning, damaged."""
        path = self.file(layer, key)
        try:
            entry = read_entry(path)
            if entry.header.get("key") != key:
                raise DamagedEntryError(f"{path} is the file of another entry, {entry.header.get('key')}")
        except FileNotFoundError:
            return None
        except (DamagedEntryError, OSError) as error:
            self.counts["damaged"] += 1
            _log.warning("an entry of the store cannot be used and is made again: %s", error)
            if isinstance(error, DamagedEntryError):
                path.unlink(missing_ok=True)  # said once, not at each look
            return None
        with suppress(OSError):  # somebody else's store
            os.utime(path)  # its age counts from its last use
        return entry

    def write(self, layer: str, key: str, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep an entry. Where that fails (a full disk, a folder of somebody else's), warn and go on without."""
        header = {**about, "layer": layer, "key": key, "made": time.time(), "versions": versions()}
        try:
            write_entry(self.file(layer, key), arrays, header)
        except OSError as error:
            _log.warning("an entry could not be kept in the store %s: %s", self.path, error)

    @contextmanager
    def claim(self, keys: Sequence[str]) -> Iterator[set[str]]:
        """Hold the locks of those entries that nobody else is making; of at least one.

        Where others hold all of them, waits for the first one. Nothing is held while waiting, so two processes cannot
        wait for each other; the locks are the system's, so that of a process that was killed is free at once.
        """
        folder = self.path / "locks"
        with ExitStack() as held:
            mine = {key for key in dict.fromkeys(keys) if self._try(held, folder / f"{key}.lock", timeout=0)}
            if not mine:
                _log.info("waiting for another process that makes the entry %s", keys[0])
                self._try(held, folder / f"{keys[0]}.lock", timeout=-1)
                mine = {keys[0]}
            yield mine

    def arrays(self, layer: str, key: str, make: Callable[[], Mapping[str, Any]], about: Mapping[str, Any]) -> Entry:
        """An entry of whatever kind: stored, or made and stored now, by one process alone."""
        entry = self.read(layer, key)
        if entry is not None:
            return entry
        with self.claim([key]):
            entry = self.read(layer, key)
            if entry is None:
                entry = Entry({name: np.asarray(value) for name, value in make().items()}, dict(about))
                self.write(layer, key, entry.arrays, about)
        return entry

    @staticmethod
    def _try(held: ExitStack, path: Path, *, timeout: float) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path).acquire(timeout=timeout, poll_interval=POLL))
        except Timeout:
            return False
        except OSError as error:  # somebody else's store: what is made cannot be kept there anyway
            _log.warning("no lock could be taken in the store, so the same work may be done twice: %s", error)
        return True


def open_store(store: str | Path | TraceStore | None, *, keep_samples: bool = True) -> TraceStore | None:
    """The store of a folder; the same one, with what it has in memory, each time in one process.

    Raises:
        TypeError, ValueError: It is neither a folder nor the path of one that can be made.
    """
    if store is None or isinstance(store, TraceStore):
        return store
    if not isinstance(store, str | Path) or not str(store):
        raise TypeError(f"`store` must be the path of a folder or null, got {store!r}")
    made = TraceStore(store, keep_samples=keep_samples)
    with _opening:
        return _opened.setdefault((made.path, keep_samples), made)
