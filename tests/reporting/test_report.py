"""The reports of whole runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import write_results
from dipguard.evaluation.runner import run
from dipguard.reporting.canvas import draw_panel
from dipguard.reporting.loggers import open_log
from dipguard.reporting.report import results_text, write_matrix_report, write_train_report
from tests.csv_files import read_csv
from tests.reporting import stored_run
from tests.reporting.stored_run import cell, point
from tests.tiny_matrix import tiny_matrix


def test_panels_show_each_image_under_its_own_decision(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    ((place, (result,)),) = matrix.results.items()
    result = replace(result, decisions_given=torch.tensor([1, 2, 3]), decisions=torch.tensor([4, 5, 6]))
    seen: dict = {}
    monkeypatch.setattr("dipguard.reporting.report.draw_panel", lambda rows: seen.update(rows) or draw_panel(rows))
    write_train_report(replace(matrix, config=replace(matrix.config, figures=2), results={place: [result]}))
    shown = (matrix.clean.images, matrix.attacked(*place), matrix.reconstructions(*place))
    assert len(seen) == 2
    for i, pictures in enumerate(seen.values()):
        assert all(torch.equal(p.image, images[i]) for p, images in zip(pictures, shown, strict=True))
        assert [p.decision for p in pictures[1:]] == [str(1 + i), str(4 + i)]


def test_train_report_holds_the_result(matrix: Matrix) -> None:
    metrics = write_train_report(replace(matrix, config=replace(matrix.config, figures=0)))
    (cell,) = matrix.cells
    (result,) = matrix.results[cell.place]
    labels = matrix.clean.labels
    assert json.loads((matrix.folder / "metrics.json").read_text()) == metrics
    assert metrics["n"] == 3
    assert metrics["accuracy"] == {
        "clean": float((cell.target.decisions_clean == labels).double().mean()),
        "undefended": float((result.decisions_given == labels).double().mean()),
        "defended": float((result.decisions == labels).double().mean()),
    }
    assert metrics["ssim"]["defended"] == pytest.approx(float(result.ssim.mean()))
    assert metrics["crossings_stitched"] == float(result.used.double().mean())
    assert metrics["images_without"] == result.reasons.count("no_crossing")
    assert "windows_averaged" not in metrics
    assert set(metrics["seconds"]) == {"attack", "start", "fit", "decide"}
    assert metrics["settings"]["defenses"]["paper"]["tau"] == 0.2
    with np.load(matrix.folder / "reconstructions.npz", allow_pickle=False) as saved:
        assert np.array_equal(saved["images"], matrix.reconstructions(*cell.place).numpy())
        assert saved["labels"].tolist() == labels.tolist()
        assert saved["indices"].tolist() == matrix.clean.indices.tolist()


def test_train_page_states_the_figures_and_links_the_pictures(matrix: Matrix) -> None:
    right = write_train_report(matrix)["accuracy"]
    text = (matrix.folder / "report.md").read_text()
    assert f"| {right['clean']:.1%} | {right['undefended']:.1%} | {right['defended']:.1%} |" in text
    assert "`pgd` at 8/255" in text
    assert "](figures/panel.png)" in text
    assert ", `traces/` (decision traces" in text


def test_no_file_holds_nan_or_infinity(matrix: Matrix) -> None:
    ((place, (result,)),) = matrix.results.items()
    odd = replace(result, psnr=torch.full_like(result.psnr, torch.inf), ssim=torch.full_like(result.ssim, torch.nan))
    config = replace(matrix.config, figures=0, trainer={**matrix.config.trainer, "gradient_clip_val": float("inf")})
    matrix = replace(matrix, config=config, results={place: [odd]})
    write_results(matrix)
    write_train_report(matrix)
    metrics = json.loads((matrix.folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["ssim"]["defended"] is None
    assert metrics["settings"]["trainer"]["gradient_clip_val"] is None
    line = read_csv(matrix.folder / "images.csv")[-1]
    assert (line["psnr"], line["ssim"]) == ("", "")


@pytest.mark.parametrize(("wanted", "drawn"), [(0, 0), (1, 2)])
def test_as_many_figures_as_wanted(matrix: Matrix, wanted: int, drawn: int) -> None:
    write_train_report(replace(matrix, config=replace(matrix.config, figures=wanted)))
    paths = list((matrix.folder / "figures").glob("*.png"))
    assert len(paths) == drawn
    assert all(matplotlib.image.imread(path).shape[2] == 4 for path in paths)


def test_a_matrix_of_one_cell_has_its_pictures(matrix: Matrix) -> None:
    write_results(matrix)
    made = {path.relative_to(matrix.folder).as_posix() for path in write_matrix_report(matrix)}
    assert {"figures/panel.png", "figures/trace_000000.png"} <= made
    assert "![panel](figures/panel.png)" in (matrix.folder / "report.md").read_text()


def test_rebuild_makes_the_tables_from_the_store(matrix: Matrix) -> None:
    before = (matrix.folder / "results.csv").read_text()
    for path in matrix.folder.glob("*.csv"):
        path.unlink()
    config = replace(matrix.config, rebuild=True, figures=0)
    metrics = write_train_report(replace(matrix, config=config, results={}))
    assert metrics["n"] == 3
    assert (matrix.folder / "results.csv").read_text() == before


def test_a_train_report_needs_a_result(finished: Matrix, tmp_path: Path) -> None:
    matrix = prepare(replace(finished.config, rebuild=True), tmp_path)
    with pytest.raises(RuntimeError, match="attack pgd on defence paper: not run yet"):
        write_train_report(matrix)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    matrix = tiny_matrix(
        tmp_path_factory.mktemp("several"),
        "data.limit=3", "~attacks.fgsm_8", "~defenses.median", "~defenses.dip_fixed", "~defenses.mirror", "figures=1",
    )  # fmt: skip
    assert run(matrix) == []
    return matrix


@pytest.mark.slow
def test_matrix_report_has_tables_comparisons_and_a_log(several: Matrix) -> None:
    several = replace(several, config=replace(several.config, logger={"kind": "csv"}))
    with open_log(several) as log:
        run(several, log=log)
        made = write_matrix_report(several, log=log)
    assert {path.name for path in made} == {
        "report.md", "figure9_clean.png", "figure9_pgd_8.png",
        *(f"table{n}.{kind}" for n in (1, 2) for kind in ("md", "tex")),
    }  # fmt: skip
    page = (several.folder / "report.md").read_text()
    assert page.startswith("# Table 1: accuracy, %")
    assert "![figure9 pgd 8](figure9_pgd_8.png)" in page
    assert {path.name for path in (several.folder / "figures").iterdir()} == {
        *(f"panel_paper.{attack}.png" for attack in ("clean", "pgd_8")),
        *(f"trace_paper.{attack}_000000.png" for attack in ("clean", "pgd_8")),
    }
    lines = read_csv(several.folder / "logs" / "csv" / "session_0" / "metrics.csv")
    assert len([line for line in lines if line["fit/paper/clean/accuracy"]]) == 10
    results = [several.results[attack, "jpeg"][0] for attack in ("clean", "pgd_8")]
    right = [float(result.right.double().mean()) for result in results]
    (_, last) = [line for line in lines if line["result/jpeg/mean_accuracy"]]
    assert float(last["result/jpeg/pgd_8/accuracy"]) == pytest.approx(right[1], abs=1e-6)
    assert float(last["result/jpeg/mean_accuracy"]) == pytest.approx(sum(right) / 2, abs=1e-6)


def test_text_for_the_terminal_has_both_tables(several: Matrix) -> None:
    text = results_text(several.folder)
    assert "Table 1: digits, victim digits_cnn, seed 0" in text
    assert "Table 2" in text
    assert "suite" not in text


def test_a_cell_without_budgets_does_not_make_a_column_of_an_attack_that_has_them(tmp_path: Path) -> None:
    lines = [cell("clean", name, 30) for name in ("none", "jpeg")] + [cell("clean", "comdefend", None)]
    bpda = {"attack_name": "bpda"}
    lines += [point("bpda_8", "jpeg", 8, budget, 12, **bpda) for budget in (5, 10)]
    lines += [cell("bpda_8", "comdefend", None, **bpda)]
    stored_run.write_results(tmp_path, lines)
    text = results_text(tmp_path)
    assert "Table 1" in text
    assert "bpda_8" not in text


def test_an_attack_with_budgets_that_no_figure_has_is_in_the_tables(tmp_path: Path) -> None:
    lines = [cell("clean", "jpeg", 30), *(point("own", "jpeg", 8, budget, 16 - budget) for budget in (5, 8))]
    lines += [point("hopskipjump", "jpeg", "", budget, 16 - budget) for budget in (5, 12)]  # without an eps
    stored_run.write_results(tmp_path, lines)
    row = next(line for line in results_text(tmp_path).splitlines() if line.startswith("| jpeg"))
    assert [float(part) for part in re.findall(r"[\d.]+", row)][:3] == [93.8, 50.0, 25.0]


def test_a_matrix_without_a_finished_cell_says_so(several: Matrix, tmp_path: Path) -> None:
    matrix = prepare(replace(several.config, rebuild=True), tmp_path)
    assert [path.name for path in write_matrix_report(matrix)] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "No cell is finished yet.\n"
    assert results_text(tmp_path) == ""
