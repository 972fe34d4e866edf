from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dipguard.evaluation.cells import MatrixFolder, check_label, key_of


@pytest.mark.parametrize("label", ["pgd_8", "a", "tau.9+beta-1", "8"])
def test_a_label_is_a_file_name(label: str) -> None:
    assert check_label(label, name="rows") == label


@pytest.mark.parametrize("label", ["", "a/b", "..", ".x", "a b", "-x"])
def test_what_is_no_file_name_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="`rows` must be named by letters"):
        check_label(label, name="rows")


def test_a_key_changes_with_values_and_not_with_their_order() -> None:
    assert key_of(a={"x": 1, "y": 2}, b=3) == key_of(b=3, a={"y": 2, "x": 1})
    assert len({key_of(a=1), key_of(a=2), key_of(b=1), key_of(a="1")}) == 4


def test_a_file_comes_back_only_with_its_key_and_undamaged(tmp_path: Path) -> None:
    folder = MatrixFolder(tmp_path / "run")
    path = folder.cell_path("pgd_8", "jpeg")
    assert folder.load(path, key="k") is None
    folder.save(path, {"images": np.arange(6, dtype=np.float32), "seconds": np.float64(2.5)}, key="k")
    saved = folder.load(path, key="k")
    assert saved is not None
    assert saved["images"].tolist() == [0, 1, 2, 3, 4, 5]
    assert float(saved["seconds"]) == 2.5
    assert folder.load(path, key="other") is None
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not an archive"):
        path.write_bytes(damaged)
        assert folder.load(path, key="k") is None


def test_parts_are_dropped_together(tmp_path: Path) -> None:
    folder = MatrixFolder(tmp_path)
    for start in (0, 32):
        folder.save(folder.part_path("clean", "none", start), {"images": np.zeros(1)}, key="k")
    folder.save(folder.cell_path("clean", "none"), {"images": np.zeros(1)}, key="k")
    folder.drop_parts("clean", "none")
    assert [path.name for path in (tmp_path / "cells" / "clean").iterdir()] == ["none.npz"]
