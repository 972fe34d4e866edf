"""The store: a folder of results under the digest of everything that they depend on.

    attacks/<ab>/<key>.npz   attacked images
    cells/<ab>/<key>.npz     cells of an evaluation: reconstructions of a chunk, figures of a finished cell
    fits/<ab>/<key>.npz      a DIP fit before any classifier saw it: x(t), v(t) and the loss at the sampled steps
    traces/<ab>/<key>.npz    a fit as a victim saw it: decisions, on-boundary images, the last reconstructions
    locks/<key>.lock         held while an entry is being made; the system frees it when its process dies

An entry that is missing, damaged or from other versions of the libraries is made again, so every file may be deleted.

A file is an uncompressed NumPy archive. The member ``header`` is JSON text that says what the entry was made from; the
archive's comment is the SHA-256 of all bytes before it. Images keep the float type of the fit: with half the bits, a
decision near the boundary could change.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from dipguard.checks import check_bool
from dipguard.files import write_bytes
from dipguard.store.keys import numerics

_log = logging.getLogger(__name__)

FORMAT = "dipguard.store/2"
"""To be raised with every change of what an entry holds: its arrays and header fields are read unchecked."""
HEADER = "header"
DIGEST_LENGTH = 64  # hex digits of a SHA-256
LAYERS = ("attacks", "cells", "fits", "traces")
POLL = 0.1
"""Seconds between two attempts to get a lock that another process holds."""
TOUCH = 3600.0
"""Seconds after which a read makes an entry young again."""
T = TypeVar("T")


class DamagedEntryError(ValueError):
    """The content of a file in the store is not what was written."""


@dataclass(frozen=True, eq=False)
class Entry:
    """The content of an entry: NumPy arrays by name, and what they were made from and small results as JSON values."""

    arrays: dict[str, Any]
    header: dict[str, Any]


class Store:
    """Results that are computed once, for all processes that share a folder.

    ``path`` is created with the first entry. With ``keep_samples`` x(t) is kept at all sampled steps (float32, 12 KiB
    for a sample of 32x32 pixels); else a stored fit serves other tau, t0, K and beta, but no other victim or decisions.
    ``counts`` is what this process did, in images: ``fitted``, ``decided`` (from stored samples), ``replayed``
    (stitched from a stored trace), ``attacked``, ``attacks_found``, and ``damaged`` entries. ValueError if ``path``
    exists and is not a folder.
    """

    def __init__(self, path: str | Path, *, keep_samples: bool = True) -> None:
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`store` must be a folder, got {self.path}, which is a file")
        self.keep_samples = check_bool(keep_samples, name="keep_samples")
        self.counts: Counter[str] = Counter()

    def file(self, layer: str, key: str) -> Path:
        """The path of an entry."""
        return self.path / layer / key[:2] / f"{key}.npz"

    def read(self, layer: str, key: str) -> Entry | None:
        """An entry, or None if it is missing or (with a warning) damaged."""
        return self.read_as(layer, key, lambda entry: entry)

    def read_as(self, layer: str, key: str, parse: Callable[[Entry], T]) -> T | None:
        """What ``parse`` makes of an entry; where it raises an error, the entry counts as damaged."""
        path = self.file(layer, key)
        try:
            entry = read_entry(path)
            if entry.header.get("key") != key:
                raise DamagedEntryError(f"{path} is the file of another entry, {entry.header.get('key')}")
            made = parse(entry)
        except FileNotFoundError:
            return None
        except (OSError, LookupError, AttributeError, TypeError, ValueError) as error:
            self.counts["damaged"] += 1
            _log.warning("the entry %s cannot be used and is made again: %s: %s", path, type(error).__name__, error)
            if not isinstance(error, OSError):
                self.remove(layer, key)  # warn once, not at each read
            return None
        with suppress(OSError):  # a store that this user may only read
            if time.time() - path.stat().st_mtime > TOUCH:
                os.utime(path)  # an entry's age counts from its last use
        return made

    def write(self, layer: str, key: str, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write an entry. If that fails (full disk, no permission), warn and continue without it."""
        header = {**about, "layer": layer, "key": key, "made": time.time(), "versions": numerics()}
        try:
            write_entry(self.file(layer, key), arrays, header)
        except OSError as error:
            _log.warning("an entry could not be kept in the store %s: %s", self.path, error)

    def remove(self, layer: str, key: str) -> None:
        """Delete an entry if there is one, and this user may."""
        with suppress(OSError):
            self.file(layer, key).unlink()

    def arrays(self, layer: str, key: str, make: Callable[[], Entry]) -> Entry:
        """The stored entry; if there is none, ``make`` is called and its result stored, by one process alone."""
        entry = self.read(layer, key)
        if entry is None:
            with self.claim([key]):
                entry = self.read(layer, key)
                if entry is None:
                    entry = make()
                    self.write(layer, key, entry.arrays, entry.header)
        return entry

    @contextmanager
    def claim(self, keys: Sequence[str]) -> Iterator[set[str]]:
        """Hold the locks of those entries that no other process is making; if there is none, wait for the first.

        No lock is held while waiting, so two processes cannot wait for each other.
        """
        with ExitStack() as held:
            mine = {key for key in dict.fromkeys(keys) if self._lock(held, key, timeout=0)}
            if not mine:
                _log.info("waiting for another process that makes the entry %s", keys[0])
                self._lock(held, keys[0], timeout=-1)
                mine = {keys[0]}
            yield mine

    def _lock(self, held: ExitStack, key: str, *, timeout: float) -> bool:
        path = self.path / "locks" / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path).acquire(timeout=timeout, poll_interval=POLL))
        except Timeout:
            return False
        except OSError as error:  # no permission; then the entry cannot be written either
            _log.warning("no lock could be taken in the store, so the same work may be done twice: %s", error)
        return True


def open_store(store: str | Path | Store | None, *, keep_samples: bool = True) -> Store | None:
    """The store of a folder; TypeError or ValueError if there can be none."""
    if store is None or isinstance(store, Store):
        return store
    if not isinstance(store, str | Path) or not str(store):
        raise TypeError(f"`store` must be the path of a folder or null, got {store!r}")
    return Store(store, keep_samples=keep_samples)


def write_entry(path: Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write an entry atomically."""
    buffer = io.BytesIO()
    members: dict[str, Any] = {**arrays, HEADER: np.str_(json.dumps({**header, "format": FORMAT}, sort_keys=True))}
    np.savez(buffer, **members)
    # The last two bytes of a zip archive are the length of the comment that follows.
    body = buffer.getvalue()[:-2] + DIGEST_LENGTH.to_bytes(2, "little")
    write_bytes(path, body + hashlib.sha256(body).hexdigest().encode())


def read_entry(path: Path) -> Entry:
    """Read an entry, whose checksum is verified before anything is parsed; FileNotFoundError or DamagedEntryError."""
    content = path.read_bytes()
    body, digest = content[:-DIGEST_LENGTH], content[-DIGEST_LENGTH:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedEntryError(f"{path} is damaged: its content is not what was written")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        header: dict[str, Any] = dict(json.loads(str(arrays.pop(HEADER))))
    except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedEntryError(f"{path} is damaged: it holds no entry of a store ({error})") from error
    if header.get("format") != FORMAT:
        raise DamagedEntryError(f"{path} must be an entry of a store ({FORMAT}), got {header.get('format')!r}")
    return Entry(arrays, header)
