"""Sweeps from end to end: Hydra's multirun over real jobs, resumed, failing, collected."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from dipguard.cli.main import main
from dipguard.cli.sweep_progress import SweepProgress, progress_line, report_open_sweeps
from dipguard.config import from_hydra, register
from dipguard.data import load_data
from dipguard.evaluation.sweep_job import objective
from dipguard.reporting.sweep_jobs import read_sweep
from dipguard.reporting.sweep_report import summary
from tests.csv_files import read_csv
from tests.reporting import stored_run
from tests.sweeps.tiny_sweep import FAST, GRID, done_times, run_sweep
from tests.tiny_run import CONF

MEANT = "did you mean 'defense.quality'"
MADE = {"report.md", "sweep.csv", "figure6_mean.png", "figure7_columns.png", "map_quality_steps.png"}


def lines(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "sweep.csv")


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
        cells = read_csv(finished / row["job"] / "results.csv")
        cell = next(cell for cell in cells if cell["attack"] == row["attack"])
        assert float(row["accuracy"]) == float(cell["accuracy"])
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
    report = (finished / "report.md").read_text()
    assert "4 jobs: 4 done." in report
    for name in ("quality", "steps"):
        assert f"| {name} " in report
    assert dict(read_sweep(finished).parameters) == {"defense.quality": (30, 90), "attacks.pgd_8.steps": (1, 2)}


@pytest.mark.slow
def test_started_again_only_what_is_missing_or_of_other_settings_runs(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    before = done_times(folder)
    changed = next(name for name in before if "quality=90,steps=1-" in name)
    cells = {path: path.stat().st_mtime_ns for path in (folder / "store" / "cells").rglob("*.npz")}
    (folder / changed / "DONE").write_text(json.dumps({"key": "of other settings", "seconds": 1}))
    (folder / "report.md").unlink()
    run_sweep(folder, *FAST, GRID[0], "attacks.pgd_8.steps=1")
    after = done_times(folder)
    assert {name for name in after if after[name] != before[name]} == {changed}
    for _ in range(2):  # a log that was not asked for before is written from the store, once
        run_sweep(folder, *FAST, GRID[0], "attacks.pgd_8.steps=1", "logger=csv")
        logs = [path.parents[3].name for path in folder.glob("*/logs/csv/session_*/metrics.csv")]
        assert sorted(logs) == sorted(read_sweep(folder).jobs)
    assert cells
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    # The jobs of the earlier, larger grid are left out.
    assert len(read_sweep(folder).jobs) == 2
    assert "2 more of earlier starts" in (folder / "report.md").read_text()
    assert len(lines(folder)) == 2 * 2


def test_rebuilt_jobs_stay_as_they_ended(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    first, *_ = done_times(folder)
    (folder / first / "DONE").unlink()  # as of a job that was killed
    before = done_times(folder)
    (folder / "report.md").unlink()
    run_sweep(folder, *FAST, *GRID, "rebuild=true")
    assert done_times(folder) == before
    assert "4 jobs: 3 done, 1 unfinished." in (folder / "report.md").read_text()


def test_progress_counts_the_jobs_that_are_done(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    gone, killed, *_ = sorted(done_times(folder))
    shutil.rmtree(folder / gone)
    (folder / killed / "DONE").unlink()
    assert progress_line(folder).startswith("2 of 4 jobs done")


def begin(*overrides: str) -> None:
    """What a sweep does before its first job."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = GlobalHydra.instance().hydra.compose_config(
            "evaluate", ["hydra.mode=MULTIRUN", *overrides], RunMode.MULTIRUN
        )
        SweepProgress().on_multirun_start(config)


def test_jobs_that_were_done_before_the_sweeps_file_changed_are_not_counted(finished: Path, tmp_path: Path) -> None:
    folder, own = copied(finished, tmp_path), tmp_path / "conf" / "sweep" / "own.yaml"
    own.parent.mkdir(parents=True)
    where = [
        f"hydra.sweep.dir={folder}",
        "store=${hydra:sweep.dir}/store",
        f"hydra.searchpath=[file://{own.parents[1]}]",
        "+sweep=own",
    ]

    def done_after(steps: int, *overrides: str) -> str:
        own.write_text(f"# @package _global_\nattacks: {{pgd_8: {{alpha_255: {steps}}}}}\n")
        begin(*where, *FAST, *GRID, *overrides)
        report_open_sweeps()
        return progress_line(folder).split(" jobs")[0]

    plan = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**plan, "base": None}))
    assert done_after(1) == "4 of 4", "nothing is known of what was before"
    assert done_after(1, "logger=csv") == "4 of 4"
    assert done_after(2, "rebuild=true") == "4 of 4"
    assert done_after(1) == "4 of 4"
    assert done_after(2) == "0 of 4"


def test_a_sweep_that_takes_the_folder_of_another_says_so(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(finished, tmp_path)
    said = []
    for quality in ("quality=30,90", "quality=30,80,90", "quality=70"):
        caplog.clear()
        given = (f"hydra.sweep.dir={folder}", *FAST, f"defense.{quality}", GRID[1])
        with caplog.at_level("INFO", logger="dipguard"):
            begin(*given)
            with pytest.raises(SystemExit, match="another process works in"):  # a sweep does, until its report
                begin(*given)
            report_open_sweeps()
        said.append("6 jobs of the sweep that had this folder before" in caplog.text)
        assert said[-1] or "had this folder before" not in caplog.text
    assert said == [False, False, True]


@pytest.mark.slow
def test_a_failing_job_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    grid = ("defense.quality=30,0,90",)
    with pytest.raises(Exception, match=r"defense.quality"):
        run_sweep(folder, *FAST, "~attacks.pgd_8", *grid)
    before = done_times(folder)
    assert len(before) == 2
    (failed,) = folder.glob("*/FAILED")
    assert "defense.quality" in json.loads(failed.read_text())["message"]
    assert "defense.quality" in (failed.parent / "evaluate.log").read_text()
    for name in before:
        assert "this job failed" not in (folder / name / "evaluate.log").read_text()
    assert "3 jobs: 2 done, 1 failed." in summary(folder)
    assert "defense.quality" in (folder / "report.md").read_text()
    with pytest.raises(Exception, match=r"defense.quality"):
        run_sweep(folder, *FAST, "~attacks.pgd_8", *grid)
    assert done_times(folder) == before


@pytest.mark.slow
def test_jobs_over_groups_and_lists_of_settings(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    fast = [override for override in FAST if override != "defense=jpeg"]
    others = [f"~defenses.{name}" for name in ("none", "median", "dip_fixed", "paper", "mirror")]
    grid = ("attack@attacks.clean=none,fgsm", "defenses.jpeg={quality:30},{quality:75}")
    run_sweep(folder, *fast, *others, "~attacks.pgd_8", "data.limit=1", *grid)
    sweep = read_sweep(folder)
    assert set(sweep.labels.values()) == {"clean", "quality"}
    jobs = sweep.jobs.values()
    assert [job.state for job in jobs] == ["done"] * 4
    assert {job.values["attack@attacks.clean"] for job in jobs} == {"none", "fgsm"}
    assert len({job.values["defenses.jpeg.quality"] for job in jobs}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_grid_as_one_would_type_it_makes_one_set_of_fits_and_ends_with_a_summary(
    tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kept = tmp_path / "sweep", [text for text in FAST if not text.startswith(("~", "defense"))]
    short = ("data.limit=2", "defense.T=20", "defense.decisions=10", "defense.t0=2", "figures=1")
    grid = ("defense=paper", "defense.tau=0.2,0.7", "defense.K=5,15")
    run_sweep(folder, *kept, *short, *grid, "store=${hydra:sweep.dir}/store", program=program)
    assert len(done_times(folder)) == 4
    sweep = read_sweep(folder)
    assert dict(sweep.parameters) == {"defense.tau": (0.2, 0.7), "defense.K": (5, 15)}
    columns = {"train": 1, "evaluate": 3}[program]
    assert len(list((folder / "store" / "traces").rglob("*.npz"))) == 2 * columns, "one set of fits serves all"
    assert not list(folder.glob("*/store/*"))
    for text in (summary(folder), capsys.readouterr().out):
        assert "4 jobs: 4 done." in text
        assert "best mean accuracy of defence paper" in text
    assert len(list(folder.glob("*/metrics.json"))) == (4 if program == "train" else 0)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        pytest.param(("defense.qualty=30,90",), r"defense.qualty", marks=pytest.mark.slow),
        pytest.param(("+defense.qualty=30,90",), MEANT, marks=pytest.mark.slow),
        pytest.param(("+defense.qualty=1", "defense.quality=30,90"), MEANT, marks=pytest.mark.slow),
        (("defense=jpeg,median", "defense.quality=30,90"), r"defense.quality"),
        (("defense=glob(j*)", "+defense.qualty=1"), MEANT),
        (("defense.quality=30,90", "hydra.output_subdir=null"), r"`hydra.output_subdir` must be .hydra"),
        pytest.param(
            ("hydra/sweeper=optuna",),
            "`hydra.sweeper.direction` must be given, mostly as maximize",
            marks=pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra sweep"),
        ),
        (("defense=jpeg,median", "+attack@attacks.x=fgsm", "+attacks.x.steps=1"), r"attacks.x.steps"),
        (("+attack@attacks.x=fgsm,cw", "attacks.x.eps_255=4"), r"attacks.x.eps_255"),
        (("defense=jpeg", "logger=none,csv"), r"jobs must differ .*, got .*logger=none and .*logger=csv"),
    ],
)
def test_a_key_that_the_defence_lacks_is_refused_before_the_first_job(
    finished: Path, tmp_path: Path, grid: tuple[str, ...], message: str
) -> None:
    folder = copied(finished, tmp_path)
    plan, before = (folder / "sweep.json").read_text(), sorted(folder.iterdir())
    with pytest.raises((SystemExit, HydraException), match=message):
        run_sweep(folder, *FAST, *grid)
    assert ((folder / "sweep.json").read_text(), sorted(folder.iterdir())) == (plan, before)
    with pytest.raises((SystemExit, HydraException), match=message):
        run_sweep(tmp_path / "new", *FAST, *grid)
    assert not (tmp_path / "new").exists()


def test_of_many_plain_values_one_job_is_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed, made = [], ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", lambda *args: composed.append(args[-1]) or made(*args))
    begin(f"hydra.sweep.dir={tmp_path}", *FAST, "seed=range(0,50)", "defense.quality=range(30,50)")
    report_open_sweeps()
    assert [job[-2:] for job in composed if job] == [["seed=0", "defense.quality=30"]]


@pytest.mark.slow
def test_relative_paths_are_those_of_the_command_line_also_where_jobs_change_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_data("digits", limit=2)
    pixels = (images.images * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "two.npz", images=pixels, labels=images.labels.numpy())
    monkeypatch.chdir(tmp_path)
    own = ("data=arrays", "data.path=two.npz", "store=fits", "data.limit=null")
    kept = [text for text in FAST if not text.startswith("data")]
    run_sweep(Path("sweep"), *kept, *own, "hydra.job.chdir=true", GRID[0])
    assert Path.cwd() == tmp_path
    assert len(done_times(tmp_path / "sweep")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "sweep", "two.npz"]
    assert "2 jobs: 2 done." in (tmp_path / "sweep" / "report.md").read_text()


def test_the_objective_is_the_mean_accuracy_of_what_was_asked_for(finished: Path, tmp_path: Path) -> None:
    for name in done_times(finished):
        found = {row["attack"]: float(row["accuracy"]) for row in read_csv(finished / name / "results.csv")}
        assert set(found) == {"clean", "pgd_8"}
        assert objective(finished / name, None) == objective(finished / name, "jpeg") == sum(found.values()) / 2
        assert objective(finished / name, "pgd_8") == found["pgd_8"]
    assert objective(finished, None) is None
    places = (("clean", "jpeg", 24), ("pgd_8", "jpeg", 16), ("clean", "none", 32), ("worst_case", "jpeg", 4))
    control = stored_run.cell("noise", "jpeg", 8, check="control")
    stored_run.write_results(tmp_path, [*(stored_run.cell(*place) for place in places), control])
    asked = {None: 24 / 32, "jpeg": 20 / 32, "clean": 28 / 32, "noise": 8 / 32, "worst_case": 4 / 32}
    assert {label: objective(tmp_path, label) for label in asked} == asked


def test_the_collector_refuses_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", str(tmp_path / "nowhere")]) == 2
    assert "holds no job" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_collector_by_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(finished, tmp_path)
    for name in MADE:
        (folder / name).unlink()
    assert main(["collect", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} >= MADE
    assert "best mean accuracy" in capsys.readouterr().out


@pytest.mark.slow
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
            assert list(config.defenses) == ["paper"]
            options = config.defenses["paper"]
            assert not config.store_T or options["T"] in config.store_T
    if name == "reconstruction":
        assert set(config.attacks) == {"clean", "fgsm_8", "pgd_8", "bim_8", "mifgsm_8"}
    if name == "optimisation":
        assert list(config.attacks) == ["pgd_8"]
