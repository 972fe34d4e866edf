"""Runs of evaluate.py and train.py that share a store."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dipguard.evaluation.runner import run
from tests.csv_files import read_csv
from tests.store.parts import list_entries
from tests.tiny_matrix import tiny_matrix

LEAN = (
    "~defenses.jpeg", "~defenses.median", "~defenses.mirror", "~attacks.pgd_8", "data.limit=3", "figures=0",
    "defenses.paper.engine=native", "defenses.paper.network=small",
    "defenses.dip_fixed.engine=native", "defenses.dip_fixed.network=small",
)  # fmt: skip


def cells(folder: Path, *overrides: str) -> tuple[dict[tuple[str, str], Tensor], Counter[str]]:
    """Reconstructions of each cell of a run, and what its store did meanwhile."""
    matrix = tiny_matrix(folder, *LEAN, *overrides)
    before = Counter(matrix.store.counts)
    assert run(matrix) == []
    counts = matrix.store.counts - before
    return {cell.place: matrix.reconstructions(*cell.place) for cell in matrix.cells}, counts


def assert_same(a: dict[tuple[str, str], Tensor], b: dict[tuple[str, str], Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def seconds(folder: Path) -> float:
    rows = {(row["attack"], row["defense"]): row for row in read_csv(folder / "results.csv")}
    return float(rows["fgsm_8", "paper"]["seconds_per_image"])


def test_rows_of_one_run_that_differ_in_the_stitch_share_their_fits(tmp_path: Path):
    own = ("~defenses.dip_fixed", "~defenses.none")
    plain, counts = cells(tmp_path / "plain", *own)
    assert counts["fitted"] == 0
    both, counts = cells(
        tmp_path / "both", *own, "+defense@defenses.later=paper", "defenses.later={K:3,tau:0.2,t0:2,T:20,"
        "decisions:10,network:small,engine:native}",
    )  # fmt: skip
    assert (counts["fitted"], counts["replayed"]) == (6, 6)
    assert not list_entries(tmp_path / "both" / "store", layers=["fits"]), "samples, which are large, are not kept"
    assert_same({place: images for place, images in both.items() if place in plain}, plain)
    assert not torch.equal(both["fgsm_8", "paper"], both["fgsm_8", "later"])


@pytest.mark.slow
def test_runs_share_fits_and_attacked_images(tmp_path: Path):
    store = f"store={tmp_path / 'store'}"
    plain, counts = cells(tmp_path / "plain")
    assert counts["fitted"] == 0  # without a shared store, fits are not stored
    first, counts = cells(tmp_path / "first", store)
    assert_same(first, plain)
    assert (counts["fitted"], counts["attacked"], counts["replayed"]) == (6, 6, 0)
    again, counts = cells(tmp_path / "again", store)  # the very same cells
    assert_same(again, plain)
    assert not counts
    second, counts = cells(tmp_path / "second", store, "defenses.paper.tau=0.3")
    assert (counts["fitted"], counts["attacked"], counts["attacks_found"], counts["replayed"]) == (0, 0, 6, 6)
    assert_same(
        {k: v for k, v in second.items() if k[1] != "paper"}, {k: v for k, v in plain.items() if k[1] != "paper"}
    )
    # A replay's cell says what its fits took. Which of the six they are does not matter: no three took less than these.
    spent = sorted(entry.header["seconds"] for entry in list_entries(tmp_path / "store", layers=["traces"]))
    assert len(spent) == 6
    assert seconds(tmp_path / "second") > 0.99 * sum(spent[:3]) / 3


def test_tables_are_remade_in_a_folder_without_traces(tmp_path: Path):
    lean = (*LEAN[:-2], "figures=1", "~defenses.dip_fixed", f"store={tmp_path / 'store'}")
    matrix = tiny_matrix(tmp_path / "run", *lean)
    assert run(matrix) == []
    again = tiny_matrix(tmp_path / "again", *lean, "rebuild=true")
    again.load()
    assert matrix.traces_path("fgsm_8", "paper", 0).is_file()
    assert not again.traces_path("fgsm_8", "paper", 0).is_file()
    for place, (result,) in matrix.results.items():
        (found,) = again.results[place]
        assert found.done
        assert torch.equal(found.decisions, result.decisions)


@pytest.mark.slow
def test_a_sweep_over_T_fits_once(tmp_path: Path):
    less = ("~defenses.dip_fixed", "~attacks.fgsm_8")
    store = (f"store={tmp_path / 'store'}", "store_T=[14,20]", "store_samples=true", *less)
    wanted, _ = cells(tmp_path / "plain", *less, "defenses.paper.T=14")
    got, counts = cells(tmp_path / "14", *store, "defenses.paper.T=14")
    assert_same(got, wanted)
    assert counts["fitted"] == 3
    _, counts = cells(tmp_path / "20", *store, "defenses.paper.tau=0.5")
    assert (counts["fitted"], counts["decided"]) == (0, 3)
    _, counts = cells(tmp_path / "20", *store, "defenses.paper.tau=0.4")
    assert (counts["fitted"], counts["decided"], counts["replayed"]) == (0, 0, 3)
