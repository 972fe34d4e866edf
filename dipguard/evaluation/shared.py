"""What many runs share: attacked images in a store, and how much of a run came from one."""

from __future__ import annotations

import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipguard.evaluation.matrix import Matrix
from dipguard.files import read_json, write_json
from dipguard.store import digest_of, victim_digest

_log = logging.getLogger(__name__)

COUNTED = ("fitted", "decided", "replayed", "attacked", "attacks_found", "damaged")
"""What is written into store.json; images but for the last, which are entries."""


def shared_attack(matrix: Matrix, column: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A column's attacked images from the matrix's store, made by one process alone where they are not there yet.

    The run folder gets them too: a second name of the same file where the file system can do that, else a copy.
    """
    store = matrix.store
    assert store is not None
    key, clean, attack = matrix.column_key(column), matrix.clean, matrix.attack(column)
    kept = digest_of([key, victim_digest(matrix.victim), torch.__version__, matrix.device.type])
    made = []

    def marked() -> dict[str, Any]:
        made.append(column)
        return {**make(), "key": np.str_(key)}

    about = {"what": f"{column}: {len(clean)} images of {matrix.config.data.name}", "attack": attack.settings}
    entry = store.arrays("attacks", kept, marked, about)
    store.counts["attacked" if made else "attacks_found"] += len(clean)
    saved = {name: array for name, array in entry.arrays.items() if name != "key"}
    path = matrix.folder.attacked_path(column)
    if not _link(store.file("attacks", kept), path):
        matrix.folder.save(path, saved, key=key)
    return saved


@contextmanager
def counted(matrix: Matrix) -> Iterator[None]:
    """Add what the store did meanwhile, in this process, to the run folder's store.json.

    A fit or a replay is counted for each image, column and row; ``fitted`` are the fits that were made, all others were
    spared.
    """
    store = matrix.store
    if store is None:
        yield
        return
    before = Counter(store.counts)
    try:
        yield
    finally:
        path = matrix.folder.path / "store.json"
        now = {name: store.counts[name] - before[name] + _earlier(path).get(name, 0) for name in COUNTED}
        write_json(path, now)
        _log.info("store: %s", ", ".join(f"{name} {count}" for name, count in now.items() if count))


def _earlier(path: Path) -> dict[str, int]:
    try:
        return {str(name): int(count) for name, count in read_json(path).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name; whether that worked. Both stay whole: nobody writes into a file that is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, temporary)
        os.replace(temporary, path)
    except OSError:  # another file system, or one without links, or the store could not keep it
        temporary.unlink(missing_ok=True)
        return False
    return True
