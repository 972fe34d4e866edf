"""The stored results of a matrix: what is finished stays finished, and is known by what it depends on.

    attacks/<column>.npz             the attacked images; made once, so that every row meets the same ones
    cells/<column>/<row>.npz         a finished cell: reconstructions and per-image figures
    cells/<column>/<row>.parts/      the finished chunks of a cell in progress
    curves/<name>/<row>/<eps>.json   defence-aware attacks (evaluation/aware.py)
    ladder/<rung>/<row>.npz          the ladder (evaluation/ladder.py)

Every file carries a key, the digest of all that it depends on. A file with another key is made again, all others stay:
a changed setting of one defence runs that defence's cells alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipguard.files import write_npz
from dipguard.store.entry import HEADER

_log = logging.getLogger(__name__)

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""What a column or row may be called: it becomes a file's name."""

BASELINE = "baseline"
"""Label of the ladder's static baseline among the rows."""
CLEAN, WORST = "clean", "worst_case"
"""Lines of the ladder that are no rung's: no attack at all, and the worst for each image."""


def check_label(label: str, *, name: str) -> str:
    """Return ``label`` if it can be a file's name.

    Raises:
        ValueError: It cannot.
    """
    if not LABEL.fullmatch(label):
        raise ValueError(f"`{name}` must be named by letters, digits and _ . + - alone, got {label!r}")
    return label


def key_of(**parts: Any) -> str:
    """A digest of JSON values, 16 hex digits; the order of keys plays no role."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class MatrixFolder:
    """The files of one matrix.

    Args:
        path: The run folder; made if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def attacked_path(self, column: str) -> Path:
        """Where a column's attacked images are kept."""
        return self.path / "attacks" / f"{column}.npz"

    def cell_path(self, column: str, row: str) -> Path:
        """Where a finished cell is kept."""
        return self.path / "cells" / column / f"{row}.npz"

    def part_path(self, column: str, row: str, start: int) -> Path:
        """Where the chunk of a cell that begins with image number ``start`` is kept."""
        return self.path / "cells" / column / f"{row}.parts" / f"{start:06d}.npz"

    def load(self, path: Path, *, key: str) -> dict[str, Any] | None:
        """The arrays of a file, or None where it is missing, damaged or of another key."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            arrays.pop(HEADER, None)  # of a file that a store shares
            if str(arrays.pop("key")) != key:
                _log.info("%s was made with other settings and is made again", path)
                return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("%s is damaged and is made again: %s", path, error)
            return None
        return arrays

    def save(self, path: Path, arrays: Mapping[str, Any], *, key: str) -> None:
        """Write a file whole or not at all."""
        write_npz(path, **arrays, key=np.str_(key))

    def drop_parts(self, column: str, row: str) -> None:
        """Remove the chunks of a cell that is finished."""
        shutil.rmtree(self.part_path(column, row, 0).parent, ignore_errors=True)
