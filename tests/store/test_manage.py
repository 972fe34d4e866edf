"""Measuring and pruning a store, as functions and on the command line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipguard.store import LAYERS, Store, prune, store_size
from dipguard.store.manage import main

DAY = 24 * 3600
AGES = {"aa1": "fits", "bb2": "traces", "cc3": "cells", "dd4": "attacks"}
"""Layers by key; the entries were used 0, 1, 2 and 3 days ago."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four entries of 4 KB."""
    store = Store(tmp_path / "store")
    for days, (key, layer) in enumerate(AGES.items()):
        store.write(layer, key, {"images": np.zeros(1000, np.float32)}, {"index": days})
        age = time.time() - days * DAY
        os.utime(store.file(layer, key), (age, age))
    return store


def keys(paths: list[Path]) -> set[str]:
    return {path.stem for path in paths}


def test_size(store: Store):
    sizes = store_size(store.path)
    assert list(sizes) == list(LAYERS)
    for key, layer in AGES.items():
        assert sizes[layer] == (1, store.file(layer, key).stat().st_size)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, ""),
        ({"older_than": 1.5}, "cc3 dd4"),
        ({"max_gib": 0}, "aa1 bb2 cc3 dd4"),
        ({"max_gib": 11_000 / 2**30}, "cc3 dd4"),
        ({"max_gib": 11_000 / 2**30, "older_than": 0.5}, "bb2 cc3 dd4"),
    ],
)
def test_prune(store: Store, options: dict[str, Any], gone: str):
    assert keys(prune(store.path, **options)) == set(gone.split())
    assert {key for key, layer in AGES.items() if store.file(layer, key).exists()} == set(AGES) - set(gone.split())


def test_a_read_entry_is_young_again(store: Store):
    store.read("attacks", "dd4")
    assert keys(prune(store.path, older_than=1.5)) == {"cc3"}


def test_locks_go_unless_they_are_held(store: Store):
    with store.claim(["aa1"]):
        with store.claim(["bb2"]):
            pass
        prune(store.path)
        assert [path.name for path in (store.path / "locks").iterdir()] == ["aa1.lock"]


@pytest.mark.parametrize(
    ("folder", "options", "error", "message"),
    [
        ("none", {}, FileNotFoundError, "`folder` must be a store, got .* which is no folder"),
        ("", {"older_than": -1}, ValueError, "`older_than`"),
        ("", {"max_gib": -1}, ValueError, "`max_gib`"),
        ("", {"max_gib": "20G"}, TypeError, "`max_gib`"),
    ],
)
def test_bad_arguments(store: Store, folder: str, options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        prune(store.path / folder, **options)


def test_command_line(store: Store, capsys: pytest.CaptureFixture[str]):
    assert main([str(store.path)]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [[x, "1", "entries"] for x in LAYERS]
    assert main([str(store.path), "--older-than", "1.5", "--max-gib", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 entries removed"
    assert [line.split()[1] for line in lines[1:]] == ["0", "0", "1", "1"]
    assert main([str(store.path / "none")]) == 2
    assert "which is no folder" in capsys.readouterr().err
