"""One file of the store: a NumPy archive that knows by itself whether it is whole.

An entry is an uncompressed npz (``numpy.load`` reads it) with a member ``header``, JSON text that says what it was made
from, and the SHA-256 of all bytes before it as the archive's comment. Images stay float32 or float64 as the fit made
them: with half the bits a decision next to the boundary may tip, and a replay would no longer be the fit's own; and
noise-like mantissas do not compress.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipguard.files import write_bytes

FORMAT = "dipguard.store/1"
HEADER = "header"
DIGEST_LENGTH = 64  # hex digits of a SHA-256


class DamagedEntryError(ValueError):
    """A file of the store is not what was written."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What a file holds.

    Attributes:
        arrays: NumPy arrays by name.
        header: What they were made from; values that JSON can hold.
    """

    arrays: dict[str, Any]
    header: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the arrays in memory."""
        return sum(int(array.nbytes) for array in self.arrays.values())


def write_entry(path: Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> int:
    """Write an entry whole or not at all, also where the process is killed meanwhile; returns its size in bytes."""
    buffer = io.BytesIO()
    text = json.dumps({**header, "format": FORMAT}, sort_keys=True)
    members: dict[str, Any] = {**arrays, HEADER: np.str_(text)}
    np.savez(buffer, **members)
    # The last two bytes of an archive are the length of its comment, which follows.
    body = buffer.getvalue()[:-2] + DIGEST_LENGTH.to_bytes(2, "little")
    write_bytes(path, body + hashlib.sha256(body).hexdigest().encode())
    return len(body) + DIGEST_LENGTH


def read_entry(path: Path) -> Entry:
    """What :func:`write_entry` wrote; nothing of a file is interpreted before its digest is found right.

    Raises:
        FileNotFoundError: No such file.
        DamagedEntryError: The file is damaged, or is no entry.
    """
    content = path.read_bytes()
    body, digest = content[:-DIGEST_LENGTH], content[-DIGEST_LENGTH:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedEntryError(f"{path} is damaged: its content is not what was written")
    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved.files}
    return Entry(arrays, _header(arrays.pop(HEADER, np.str_("{}")), path))


def read_header(path: Path) -> dict[str, Any]:
    """An entry's header, read without the rest of the file and without checking the digest.

    Raises:
        FileNotFoundError: No such file.
        DamagedEntryError: The file is damaged, or is no entry.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            return _header(saved[HEADER], path)
    except FileNotFoundError:
        raise
    # What a damaged archive raises has no common base: bad offsets, bad flags, bad lengths, a bad array header.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile) as e:
        raise DamagedEntryError(f"{path} is damaged: {e}") from e


def _header(text: Any, path: Path) -> dict[str, Any]:
    header = json.loads(str(text))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise DamagedEntryError(f"{path} must be an entry of a store ({FORMAT}), got {got!r}")
    return header
