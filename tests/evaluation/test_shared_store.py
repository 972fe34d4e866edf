"""Runs of evaluate.py and train.py that share a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from dipguard.evaluation.matrix_run import run_matrix

from dipguard.store import store_size
from tests.tiny_matrix import tiny_matrix
from tests.tiny_run import tiny_run

LEAN = (
    "~rows.jpeg", "~rows.median", "~rows.dipguard", "~columns.pgd_8", "data.limit=3",
    "+rows.paper.options.engine=native", "rows.paper.options.network=small",
    "+rows.dip_fixed.options.fit.engine=native", "+rows.dip_fixed.options.fit.network=small",
)  # fmt: skip


def cells(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Reconstructions of each cell of a run, and what its store.json says."""
    run_matrix(tiny_matrix(folder, *LEAN, *overrides))
    images = {str(path.relative_to(folder)): np.load(path)["images"] for path in sorted(folder.glob("cells/*/*.npz"))}
    counts = folder / "store.json"
    return images, json.loads(counts.read_text()) if counts.is_file() else {}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_run_folders_share_fits_and_attacked_images(tmp_path: Path):
    store = f"store={tmp_path / 'store'}"
    plain, counts = cells(tmp_path / "plain")
    assert counts == {}
    first, counts = cells(tmp_path / "first", store)
    assert_same(first, plain)
    assert (counts["fitted"], counts["attacked"], counts["replayed"]) == (6, 6, 0)
    second, counts = cells(tmp_path / "second", store)
    assert_same(second, plain)
    assert (counts["fitted"], counts["attacks_found"], counts["replayed"]) == (0, 6, 6)
    # Each folder has its attacked images, which lie on the disk once.
    paths = [tmp_path / name / "attacks" / "fgsm_8.npz" for name in ("first", "second")]
    assert paths[0].samefile(paths[1])
    seconds = [float(np.load(tmp_path / name / "cells/fgsm_8/paper.npz")["seconds"]) for name in ("first", "second")]
    assert seconds[1] > 0.5 * seconds[0]  # a replay's cell says what the fit took


def test_a_sweep_over_T_fits_once(tmp_path: Path):
    store = (f"store={tmp_path / 'store'}", "store_T=[14,20]", "~rows.dip_fixed", "~columns.fgsm_8")
    wanted, _ = cells(tmp_path / "plain", *store[2:], "rows.paper.options.T=14")
    got, counts = cells(tmp_path / "14", *store, "rows.paper.options.T=14")
    assert_same(got, wanted)
    assert counts["fitted"] == 3
    _, counts = cells(tmp_path / "20", *store, "rows.paper.options.tau=0.5")
    assert (counts["fitted"], counts["decided"]) == (0, 3)
    _, counts = cells(tmp_path / "20", *store, "rows.paper.options.tau=0.4")  # the same folder goes on counting
    assert (counts["fitted"], counts["decided"], counts["replayed"]) == (0, 3, 3)


def test_train_runs_share_a_store(tmp_path: Path):
    options = (
        "data.limit=2",
        "fit.engine=native",
        "network=small",
        "defense.T=20",
        "defense.decisions=10",
        "report.figures=0",
    )
    store = f"store={tmp_path / 'store'}"
    plain = tiny_run(tmp_path / "plain", *options)
    for name in ("first", "second"):
        got = tiny_run(tmp_path / name, *options, store)
        assert got["accuracy"] == plain["accuracy"]
    assert store_size(tmp_path / "store")["fits"][0] == 2
    tiny_run(tmp_path / "second", *options)  # with or without a store, the run is the same
