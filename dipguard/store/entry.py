"""One file of the store: an uncompressed NumPy archive with a JSON header and a checksum.

The member ``header`` is JSON text that says what the entry was made from; the archive's comment is the SHA-256 of all
bytes before it. Images keep the float type of the fit: with half the bits, a decision near the boundary could change.
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

FORMAT = "dipguard.store/2"
HEADER = "header"
DIGEST_LENGTH = 64  # hex digits of a SHA-256


class DamagedEntryError(ValueError):
    """The content of a file in the store is not what was written."""


@dataclass(frozen=True, eq=False)
class Entry:
    """The content of an entry: NumPy arrays by name, and what they were made from and small results as JSON values."""

    arrays: dict[str, Any]
    header: dict[str, Any]


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
