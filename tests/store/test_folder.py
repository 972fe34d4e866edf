"""Files of the store: whole, or known to be damaged."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipguard.store.folder import FORMAT, DamagedEntryError, read_entry, write_entry

ARRAYS = {
    "images": np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32),
    "steps": np.arange(4),
    "empty": np.zeros((0, 3, 8, 8), np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ab" / "abc.npz"
    write_entry(file, ARRAYS, {"key": "abc", "index": 3})
    return file


def test_what_is_written_is_read(path: Path):
    assert os.listdir(path.parent) == ["abc.npz"]  # no temporary file is left
    entry = read_entry(path)
    assert entry.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert entry.arrays[name].dtype == array.dtype
        assert np.array_equal(entry.arrays[name], array)
    assert (entry.header["key"], entry.header["index"]) == ("abc", 3)


def test_anybody_can_read_it_with_numpy(path: Path):
    with np.load(path) as saved:
        assert np.array_equal(saved["images"], ARRAYS["images"])


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "a byte missing": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_seen(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedEntryError, match="damaged"):
        read_entry(path)


def test_no_flipped_bit_passes(path: Path):
    write_entry(path, {"x": np.arange(3)}, {"key": "abc"})
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(DamagedEntryError, match="damaged"):
            read_entry(path)


def archive(**members: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return buffer.getvalue()[:-2] + (64).to_bytes(2, "little")


BAD_CONTENT = {
    "no archive": b"no archive",
    "no header": archive(x=np.arange(3)),
    "no JSON": archive(header=np.str_("no JSON")),
    "a list": archive(header=np.str_("[]")),
    "another format": archive(header=np.str_('{"format": "something/1"}')),
    "pickled": archive(header=np.array(f'{{"format": "{FORMAT}"}}', dtype=object)),
}


@pytest.mark.parametrize("body", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_under_a_good_digest_is_damage(path: Path, body: bytes):
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(DamagedEntryError):
        read_entry(path)


def test_a_missing_file_is_no_damage(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_entry(tmp_path / "none.npz")
