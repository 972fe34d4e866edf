"""Looking after a store, as functions and on the command line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipguard.store import Store, list_entries, prune, store_size, verify
from dipguard.store.__main__ import bytes_of, main, size_text
from dipguard.store.keys import versions

DAY = 24 * 3600


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four entries of 4 KB, used 0 to 3 days ago."""
    store = Store(tmp_path / "store")
    for days, (layer, key) in enumerate([("fits", "aa1"), ("traces", "bb2"), ("cells", "cc3"), ("attacks", "dd4")]):
        store.write(layer, key, {"images": np.zeros(1000, np.float32)}, {"index": days, "network": "small"})
        age = time.time() - days * DAY
        os.utime(store.file(layer, key), (age, age))
    return store


def keys(entries: list[Any]) -> set[str]:
    return {info.key for info in entries}


def test_list_and_size(store: Store):
    entries = list_entries(store.path)
    assert [(info.layer, info.key) for info in entries] == [
        ("attacks", "dd4"), ("cells", "cc3"), ("fits", "aa1"), ("traces", "bb2"),
    ]  # fmt: skip
    assert all(info.header["versions"] == versions() for info in entries)
    assert entries[1].header["index"] == 2
    sizes = store_size(store.path)
    assert sizes["fits"] == (1, entries[2].bytes)
    assert sum(total for _, total in sizes.values()) == sum(info.bytes for info in entries)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, set()),
        ({"older_than": 1.5}, {"cc3", "dd4"}),
        ({"older_than": 1.5, "layers": ["cells"]}, {"cc3"}),
        ({"max_bytes": 0}, {"aa1", "bb2", "cc3", "dd4"}),
        ({"max_bytes": 11_000}, {"cc3", "dd4"}),
        ({"max_bytes": 11_000, "older_than": 2.5}, {"cc3", "dd4"}),
        ({"other_versions": True}, set()),
    ],
    ids=lambda value: str(
        sorted(value) if isinstance(value, set) else value
    ),  # a set's order differs between processes
)
def test_prune(store: Store, options: dict[str, Any], gone: set[str]):
    everything = keys(list_entries(store.path))
    assert keys(prune(store.path, dry_run=True, **options)) == gone
    assert keys(list_entries(store.path)) == everything
    assert keys(prune(store.path, **options)) == gone
    assert keys(list_entries(store.path)) == everything - gone


def test_entries_of_other_versions_go(store: Store):
    from dipguard.store.entry import read_entry, write_entry

    path = store.file("fits", "aa1")
    entry = read_entry(path)
    versions = {**entry.header["versions"], "torch": "1.0"}
    write_entry(path, entry.arrays, {**entry.header, "versions": versions})
    assert keys(prune(store.path, other_versions=True)) == {"aa1"}


def test_a_read_entry_is_young_again(store: Store):
    store.read("attacks", "dd4")
    assert keys(prune(store.path, older_than=1.5)) == {"cc3"}


def test_locks_go_unless_they_are_held(store: Store):
    with store.claim(["aa1"]):
        with store.claim(["bb2"]):
            pass
        prune(store.path)
        assert [path.name for path in (store.path / "locks").iterdir()] == ["aa1.lock"]


def test_verify(store: Store):
    assert verify(store.path) == []
    path = store.file("traces", "bb2")
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    os.replace(store.file("fits", "aa1"), store.file("fits", "aa9"))  # no longer what its name says
    assert keys(verify(store.path)) == {"bb2", "aa9"}
    assert keys(verify(store.path, remove=True)) == {"bb2", "aa9"}
    assert keys(list_entries(store.path)) == {"cc3", "dd4"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda path: list_entries(path / "none"),
            FileNotFoundError,
            "`folder` must be a store, got .* does not exist",
        ),
        (lambda path: list_entries(__file__), ValueError, "which is a file"),
        (lambda path: list_entries(path, layers=["x"]), ValueError, "`layers` must be"),
        (lambda path: prune(path, older_than=-1), ValueError, "`older_than`"),
        (lambda path: prune(path, max_bytes=-1), ValueError, "`max_bytes`"),
        (lambda path: prune(path, max_bytes=1.5), TypeError, "`max_bytes`"),
    ],
)
def test_bad_arguments(store: Store, call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(store.path)


def test_command_line(store: Store, capsys: pytest.CaptureFixture[str]):
    folder = str(store.path)
    assert main(["list", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "aa1 image 0 small" in lines[2]
    assert main(["list", "--json", "--layer", "fits", folder]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert (json.loads(line)["key"], json.loads(line)["network"]) == ("aa1", "small")
    assert main(["size", folder]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "4", "entries"]
    assert main(["verify", folder]) == 0
    assert main(["prune", "--older-than", "2.5", "--dry-run", folder]) == 0
    assert "1 entries would be removed" in capsys.readouterr().out
    assert main(["prune", "--max-size", "9K", folder]) == 0
    assert keys(list_entries(folder)) == {"aa1"}
    path = store.file("fits", "aa1")
    path.write_bytes(path.read_bytes()[:99])
    capsys.readouterr()
    assert main(["verify", folder]) == 1
    assert str(path) in capsys.readouterr().out
    assert main(["list", folder]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["verify", "--remove", folder]) == 1
    assert main(["verify", folder]) == 0
    assert main(["size", folder + "none"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("500", 500), ("1.5K", 1536), ("20G", 20 * 2**30), ("2 MiB", 2**21)]
)
def test_sizes(text: str, count: int):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1K", "1Q", "ten"])
def test_bad_sizes(text: str):
    with pytest.raises(ValueError, match="a size must be a number with a unit"):
        bytes_of(text)


def test_size_text():
    assert [size_text(n) for n in (0, 1023, 1536, 3 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 TiB"]
