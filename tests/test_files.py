import csv
import errno
import os
from pathlib import Path

import pytest
import torch

from dipguard.files import csv_text, file_digest, read_json, tensor_digest, write_bytes, write_json, write_text


def test_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    write_text(path, "zwei \N{LATIN SMALL LETTER U WITH DIAERESIS}")
    assert path.read_text(encoding="utf-8").startswith("zwei")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failed_write_leaves_no_remains(tmp_path: Path) -> None:
    (tmp_path / "a.bin" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.bin"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dipguard.files.os.fsync", full)
    with pytest.raises(OSError, match=r"a\.bin"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert not list(tmp_path.iterdir())


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    assert write_bytes(tmp_path / ("x" * 255), b"new").is_file()


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "x"], "b": {"c": True}}
    assert read_json(write_json(tmp_path / "a.json", value)) == value


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b'{"seconds": NaN}', b"[-Infinity]", b"[" * 9999])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = write_bytes(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=r"a\.json must hold JSON, but it is damaged"):
        read_json(path)


def test_digest_sees_values_shapes_and_types() -> None:
    x = torch.arange(6.0)
    digests = {
        tensor_digest(tensors)
        for tensors in ([x], [x + 1], [x.view(2, 3)], [x.double()], [x[:3], x[3:]], [x[3:], x[:3]])
    }
    assert len(digests) == 6
    assert tensor_digest([x]) == tensor_digest([x.clone().requires_grad_(True)])
    assert tensor_digest([x.view(2, 3).t()]) == tensor_digest([x.view(2, 3).t().contiguous()])


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a", b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_csv_keeps_commas_and_leaves_out_what_is_missing() -> None:
    text = csv_text(("name", "n", "why"), [{"name": 'tench, "Tinca tinca"', "n": 1, "why": None}])
    assert list(csv.DictReader(text.splitlines())) == [{"name": 'tench, "Tinca tinca"', "n": "1", "why": ""}]
    assert csv_text(("name",), [{}]) == 'name\n""\n'
