"""The matrix of attacks and defences: real digits, real attacks, real rows, short fits."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dipguard.evaluation.matrix import Matrix, prepare_matrix
from dipguard.evaluation.matrix_run import attacked_images, is_done, run_matrix
from dipguard.evaluation.riders import Group, groups_of
from dipguard.evaluation.sharding import run_sharded
from dipguard.evaluation.statistics import wilson
from tests.tiny_matrix import TINY, tiny_matrix, typed_matrix


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    matrix = tiny_matrix(tmp_path_factory.mktemp("matrix"))
    run_matrix(matrix)
    return matrix


def table(matrix: Matrix, name: str) -> list[dict[str, str]]:
    with (matrix.folder.path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cells(matrix: Matrix) -> dict[tuple[str, str], Path]:
    names = ((column, row) for column in matrix.config.columns for row in matrix.rows)
    return {name: matrix.folder.cell_path(*name) for name in names}


def test_every_cell_is_there_and_agrees_with_its_row_alone(finished: Matrix) -> None:
    assert {column for column, _ in cells(finished)} == {"clean", "fgsm_8", "pgd_8"}
    assert set(finished.rows) == {"none", "jpeg", "median", "dip_fixed", "paper", "dipguard"}
    for (column, row), path in cells(finished).items():
        saved = finished.folder.load(path, key=finished.cell_key(column, row))
        assert saved is not None
        if column != "pgd_8":
            continue
        # Alone, and all images at once: neither riding on another row's fit nor the chunks change a result.
        given = attacked_images(finished, column)["images"]
        alone = finished.rows[row].purify(given, indices=finished.clean.indices)
        np.testing.assert_allclose(
            saved["images"], alone.numpy(), rtol=0, atol=1e-5 if row in ("none", "jpeg") else 0.1
        )
        assert saved["indices"].tolist() == finished.clean.indices.tolist()


def test_rows_with_the_same_fit_share_it(finished: Matrix) -> None:
    assert groups_of(finished.rows) == [
        Group("none"), Group("jpeg"), Group("median"), Group("paper", ("dip_fixed",)),
        Group("dipguard"),
    ]  # fmt: skip


def test_results_are_those_of_the_images(finished: Matrix) -> None:
    results, images = table(finished, "results.csv"), table(finished, "images.csv")
    assert len(results) == 18
    assert len(images) == 18 * 5
    for cell in results:
        mine = [r for r in images if (r["column"], r["row"]) == (cell["column"], cell["row"])]
        correct = sum(r["decision_defended"] == r["label"] for r in mine)
        assert (int(cell["n"]), int(cell["correct"])) == (5, correct)
        assert float(cell["accuracy"]) == correct / 5
        low, high = wilson(correct, 5)
        assert (float(cell["low"]), float(cell["high"])) == (
            pytest.approx(low, abs=1e-6),
            pytest.approx(high, abs=1e-6),
        )
        assert float(cell["ssim"]) == pytest.approx(np.mean([float(r["ssim"]) for r in mine]), abs=1e-5)
        assert cell["status"] == "done"
        if cell["row"] == "none":
            assert all(r["decision_given"] == r["decision_defended"] for r in mine)
    undefended = {cell["column"]: float(cell["accuracy"]) for cell in results if cell["row"] == "none"}
    assert undefended["pgd_8"] < undefended["clean"]


def test_what_is_finished_is_not_run_again(finished: Matrix) -> None:
    before = {path: path.stat().st_mtime_ns for path in cells(finished).values()}
    run_matrix(prepare_matrix(finished.config, finished.folder.path))
    assert {path: path.stat().st_mtime_ns for path in cells(finished).values()} == before


def test_a_changed_setting_runs_that_row_alone(finished: Matrix) -> None:
    before = {path: path.stat().st_mtime_ns for path in cells(finished).values()}
    changed = prepare_matrix(typed_matrix(*TINY, "rows.jpeg.options.quality=40"), finished.folder.path)
    assert [name for name in cells(changed) if not is_done(changed, *name)] == [
        (column, "jpeg") for column in ("clean", "fgsm_8", "pgd_8")
    ]
    run_matrix(changed)
    again = {name for name, path in cells(changed).items() if path.stat().st_mtime_ns != before[path]}
    assert again == {(column, "jpeg") for column in ("clean", "fgsm_8", "pgd_8")}
    run_matrix(finished)  # for the tests that come after this one


def test_a_stopped_run_goes_on_from_its_chunks(tmp_path: Path, finished: Matrix) -> None:
    only = ("~rows.jpeg", "~rows.median", "~rows.none", "~columns.fgsm_8", "~columns.clean")
    matrix = tiny_matrix(tmp_path, *only)
    run_matrix(matrix, share=(0, 2))  # the first chunk of two, as a run that was killed leaves it
    parts = sorted((tmp_path / "cells" / "pgd_8" / "paper.parts").iterdir())
    assert [path.name for path in parts] == ["000000.npz"]
    first = parts[0].stat().st_mtime_ns
    run_matrix(matrix, share=(0, 2))
    assert parts[0].stat().st_mtime_ns == first
    parts[0].write_bytes(b"damaged")
    run_matrix(matrix)
    assert not parts[0].exists()
    for row in ("paper", "dip_fixed"):
        key = matrix.cell_key("pgd_8", row)
        made = matrix.folder.load(matrix.folder.cell_path("pgd_8", row), key=key)
        whole = finished.folder.load(finished.folder.cell_path("pgd_8", row), key=key)
        assert made is not None
        assert whole is not None
        np.testing.assert_array_equal(made["images"], whole["images"])


@pytest.mark.slow
def test_two_processes_share_the_chunks(tmp_path: Path, finished: Matrix) -> None:
    matrix = tiny_matrix(tmp_path, "processes=2", "~columns.clean", "~columns.fgsm_8", "~rows.median")
    run_sharded(matrix)
    for row in matrix.rows:
        starts = sorted(path.name for path in matrix.folder.part_path("pgd_8", row, 0).parent.iterdir())
        assert starts == ["000000.npz", "000003.npz"]
    run_matrix(matrix)
    for row in matrix.rows:
        key = matrix.cell_key("pgd_8", row)
        made = matrix.folder.load(matrix.folder.cell_path("pgd_8", row), key=key)
        whole = finished.folder.load(finished.folder.cell_path("pgd_8", row), key=key)
        assert made is not None
        assert whole is not None
        np.testing.assert_allclose(made["images"], whole["images"], rtol=0, atol=1e-5 if row == "none" else 0.1)


def test_a_guide_decides_for_the_defence_and_the_victim_judges(tmp_path: Path, finished: Matrix) -> None:
    options = ("+victim@guide=digits_cnn", "~columns.fgsm_8", "~columns.clean", "~rows.none", "~rows.median")
    matrix = tiny_matrix(tmp_path, *options, "++guide.options.seed=5")
    assert matrix.rows["paper"].victim is not matrix.victim
    assert any(
        not torch.equal(a, b)
        for a, b in zip(matrix.rows["paper"].victim.parameters(), matrix.victim.parameters(), strict=True)
    )
    assert matrix.column_key("pgd_8") == finished.column_key("pgd_8")
    assert matrix.cell_key("pgd_8", "paper") != finished.cell_key("pgd_8", "paper")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chunk=0", "`chunk` must be at least 1, got 0"),
        ("columns.pgd_8.eps_255=300", "`columns.pgd_8.eps_255` must be"),
        ("+columns.pgd_8.options.step=3", "takes no option 'step'"),
        ("rows.jpeg.options.quality=0", "`rows.jpeg.options.quality` must be"),
        ("rows.paper.options.tau=2", "`rows.paper.options.tau` must be"),
        ("rows.jpeg.name=jpg", "`rows.jpeg.name` must be one of"),
        ("rows.comdefend.weights=nowhere.pt", "`rows.comdefend.weights` must name an existing weights file"),
        ("data.limit=0", "`data.limit` must be at least 1"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    extra = ["+rival@rows.comdefend=comdefend"] if "comdefend" in override else []
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        tiny_matrix(tmp_path / "run", *extra, override)
    assert not (tmp_path / "run").exists()


def test_a_row_without_its_weights_says_so_and_has_no_figure(tmp_path: Path) -> None:
    fits = ("~rows.paper", "~rows.dip_fixed", "~rows.dipguard")
    only = ("~columns.fgsm_8", "~columns.pgd_8", *fits, "+rival@rows.comdefend=comdefend")
    matrix = prepare_matrix(typed_matrix(*[t for t in TINY if "rows." not in t], *only), tmp_path)
    run_matrix(matrix)
    (cell,) = [row for row in table(matrix, "results.csv") if row["row"] == "comdefend"]
    assert "weights not supplied" in cell["status"]
    assert cell["accuracy"] == cell["ssim"] == cell["correct"] == ""
