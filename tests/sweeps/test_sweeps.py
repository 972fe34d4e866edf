"""Sweeps from end to end: Hydra's multirun over real jobs, resumed, failing, collected."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dipguard.config_matrix import from_hydra, register
from dipguard.reporting.sweep_folder import read_sweep
from dipguard.reporting.sweep_grid import MEAN, accuracy_of, crossed_pairs, profile, ranking, sensitivities
from dipguard.reporting.sweep_progress import progress_line
from dipguard.reporting.sweep_report import summary, write_sweep_report
from sweeps.collect import main as collect
from tests.sweeps.tiny_sweep import FAST, GRID, done_times, run_sweep
from tests.tiny_run import CONF

MADE = {"report.md", "sweep.csv", "figure6_mean.png", "figure7_columns.png", "map_quality_steps.png"}


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(folder, *FAST, *GRID)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "sweep"))


def test_a_sweep_ends_with_its_tables_and_plots(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= MADE
    assert len(done_times(finished)) == 4
    table = lines(finished)
    assert len(table) == 4 * 2
    assert {(row["quality"], row["steps"]) for row in table} == {(q, s) for q in ("30", "90") for s in ("1", "2")}
    for row in table:
        with (finished / row["job"] / "results.csv").open(newline="") as file:
            cell = next(cell for cell in csv.DictReader(file) if cell["column"] == row["column"])
        assert float(row["accuracy"]) == float(cell["accuracy"])
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
    report = (finished / "report.md").read_text()
    assert "4 jobs: 4 done." in report
    for name in ("quality", "steps"):
        assert f"| {name} " in report


def test_what_the_grid_says_is_what_its_jobs_found(finished: Path) -> None:
    sweep = read_sweep(finished)
    assert list(sweep.parameters.values()) == [(30, 90), (1, 2)]
    quality, steps = sweep.parameters
    by_hand = {}
    for job in sweep.jobs:
        assert accuracy_of(sweep, job, row="jpeg", column=MEAN).value == pytest.approx(
            sum(cell.accuracy for cell in job.cells) / 2, abs=1e-6
        )
        by_hand[job.values[quality], job.values[steps]] = accuracy_of(sweep, job, row="jpeg", column=MEAN).value
    shares = profile(sweep, quality, row="jpeg", column=MEAN)
    assert {value: share.value for value, share in shares.items()} == {
        value: pytest.approx((by_hand[value, 1] + by_hand[value, 2]) / 2) for value in (30, 90)
    }
    assert [len(table.jobs) for table in crossed_pairs(sweep)[quality, steps]] == [4]
    assert ranking(sweep, row="jpeg")[0][1].value == max(by_hand.values())
    ranges = {one.key: one.range for one in sensitivities(sweep, row="jpeg")}
    assert ranges[quality] == pytest.approx(abs(shares[30].value - shares[90].value))


def test_started_again_it_repeats_nothing(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    before = done_times(folder)
    cells = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    (folder / "report.md").unlink()
    run_sweep(folder, *FAST, *GRID, "logger=csv")
    assert done_times(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == cells
    assert (folder / "report.md").is_file()


def test_only_what_is_missing_or_of_other_settings_runs(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    before = done_times(folder)
    gone, changed = sorted(before)[:2]
    shutil.rmtree(folder / gone)
    (folder / changed / "DONE").write_text(json.dumps({"key": "of other settings", "seconds": 1}))
    run_sweep(folder, *FAST, *GRID)
    after = done_times(folder)
    assert {name for name in after if after[name] == before[name]} == set(before) - {gone, changed}
    assert len(after) == 4


def test_an_unfinished_sweep_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    gone, killed, *_ = sorted(done_times(folder))
    shutil.rmtree(folder / gone)
    (folder / killed / "DONE").unlink()
    write_sweep_report(folder)
    report = (folder / "report.md").read_text()
    assert "4 jobs: 2 done, 1 unfinished, 1 missing." in report
    assert gone in report
    assert killed in report
    states = {row["job"]: row["state"] for row in lines(folder)}
    assert (states[gone], states[killed]) == ("missing", "unfinished")
    assert progress_line(folder).startswith("2 of 4 jobs done")


def test_a_damaged_result_is_named_and_the_others_are_collected(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    damaged = min(done_times(folder))
    (folder / damaged / "results.csv").write_text("no,results\n1,2\n")
    write_sweep_report(folder)
    assert f"({damaged}): its results are damaged" in (folder / "report.md").read_text()
    assert len(lines(folder)) == 3 * 2 + 1


def test_a_failing_job_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    grid = ("rows.jpeg.options.quality=30,0,90",)
    with pytest.raises(Exception, match=r"rows.jpeg.options.quality"):
        run_sweep(folder, *FAST, "~columns.pgd_8", *grid)
    before = done_times(folder)
    assert len(before) == 2
    (failed,) = folder.glob("*/FAILED")
    assert "rows.jpeg.options.quality" in json.loads(failed.read_text())["message"]
    assert "rows.jpeg.options.quality" in (failed.parent / "evaluate.log").read_text()
    for name in before:
        assert "this job failed" not in (folder / name / "evaluate.log").read_text()
    assert "3 jobs: 2 done, 1 failed." in summary(folder)
    assert "rows.jpeg.options.quality" in (folder / "report.md").read_text()
    with pytest.raises(Exception, match=r"rows.jpeg.options.quality"):
        run_sweep(folder, *FAST, "~columns.pgd_8", *grid)
    assert done_times(folder) == before


def test_jobs_over_groups_and_lists_of_settings(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    run_sweep(
        folder, *FAST, "~columns.pgd_8", "attack@columns.clean=none,fgsm", "rows.jpeg.options={quality:30},{quality:75}"
    )
    sweep = read_sweep(folder)
    assert set(sweep.labels.values()) == {"clean", "quality"}
    assert len(sweep.done) == 4
    assert {job.values["attack@columns.clean"] for job in sweep.jobs} == {"none", "fgsm"}
    assert len({job.values["rows.jpeg.options.quality"] for job in sweep.jobs}) == 2


def test_jobs_of_an_earlier_grid_are_left_out_unless_asked_for(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    run_sweep(folder, *FAST, GRID[0], "columns.pgd_8.options.steps=1")
    assert len(read_sweep(folder).jobs) == 2
    assert "2 more of earlier starts" in (folder / "report.md").read_text()
    assert collect(["--all", str(folder)]) == 0
    assert len(lines(folder)) == 4 * 2


def test_the_collector_refuses_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect([str(tmp_path / "nowhere")]) == 1
    assert "holds no job" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_collector_by_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(finished, tmp_path)
    for name in MADE:
        (folder / name).unlink()
    assert collect([str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} >= MADE
    assert "best mean accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "jobs"), [("reconstruction", 17), ("optimisation", 15), ("smoke", 8), ("template", 2)]
)
def test_named_grids_are_made_of_jobs_that_compose(name: str, jobs: int) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    register()
    given = OmegaConf.load(CONF / "sweep" / f"{name}.yaml")
    params = [f"{key}={value}" for key, value in given.hydra.sweeper.params.items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    assert len(batch) == jobs
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in (batch[0], batch[-1]):
            config = from_hydra(compose("evaluate", overrides=[f"+sweep={name}", *overrides]))
            assert list(config.rows) == ["paper"]
            options = config.rows["paper"].options
            assert not config.store_T or options["T"] in config.store_T
    if name == "reconstruction":
        assert set(config.columns) == {"clean", "fgsm_8", "pgd_8", "bim_8", "mifgsm_8"}
    if name == "optimisation":
        assert list(config.columns) == ["pgd_8"]
