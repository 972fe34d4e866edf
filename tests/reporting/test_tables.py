from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dipguard.evaluation.outcome import Outcome
from dipguard.reporting.tables import write_csv, write_page, write_tables


def test_tables_hold_the_outcome(outcome: Outcome, tmp_path: Path) -> None:
    outcome = replace(outcome, folder=tmp_path)
    metrics = write_tables(outcome)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics == outcome.metrics()
    with (tmp_path / "images.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: str(value) for key, value in row.items()} for row in outcome.rows()]
    with np.load(tmp_path / "reconstructions.npz", allow_pickle=False) as saved:
        for i, reconstruction in enumerate(outcome.reconstructions):
            assert np.array_equal(saved["images"][i], reconstruction.image.numpy())
        assert saved["labels"].tolist() == outcome.clean.labels.tolist()


def test_names_with_commas_survive(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"name": 'tench, "Tinca tinca"', "n": 1}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": 'tench, "Tinca tinca"', "n": "1"}]


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`rows` must hold at least one row"):
        write_csv(tmp_path / "a.csv", [])


def test_page_states_the_figures_and_links_the_pictures(outcome: Outcome, tmp_path: Path) -> None:
    text = write_page(tmp_path / "report.md", outcome, [tmp_path / "figures" / "panel.png"]).read_text()
    accuracy = outcome.metrics()["accuracy"]
    assert f"| {accuracy['clean']:.1%} | {accuracy['undefended']:.1%} | {accuracy['defended']:.1%} |" in text
    assert "`pgd` at 8/255" in text
    assert "](figures/panel.png)" in text
