import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.runner import run
from dipguard.files import write_json
from dipguard.reporting import loggers
from dipguard.reporting.loggers import code_state, flat_settings, open_log, run_name, wandb_mode
from dipguard.reporting.report import write_train_report
from tests.csv_files import read_csv
from tests.sweeps.wandb_reader import Run, read_run
from tests.tiny_matrix import tiny_evaluation, tiny_matrix, typed_matrix
from tests.tiny_run import tiny_run, typed_config

SMALL = ("data.limit=2", "chunk=1")
DIPS = ("~attacks.fgsm_8", "~defenses.none", "~defenses.jpeg", "~defenses.median", "data.limit=2", "figures=1")


def logged(matrix: Matrix, *overrides: str) -> Matrix:
    """The matrix with the logger of these overrides."""
    return replace(matrix, config=replace(matrix.config, logger=typed_config(*overrides).logger))


def read_rows(folder: Path, *, session: int = 0) -> list[dict[str, str]]:
    return read_csv(folder / "logs" / "csv" / f"session_{session}" / "metrics.csv")


def fresh_settings() -> None:
    """W&B reads its environment and its files once a process; its records are all written after this."""
    import wandb

    wandb.teardown()


def wandb_runs(folder: Path) -> list[Run]:
    fresh_settings()
    return [read_run(path) for path in sorted(folder.glob("logs/wandb/offline-run-*"))]


def test_csv_holds_the_curves_of_all_stacks_and_the_result(tmp_path: Path) -> None:
    metrics = tiny_run(tmp_path, *SMALL, "figures=0", "logger=csv")
    rows = read_rows(tmp_path)
    steps = [int(row["step"]) for row in rows if row["fit/mse"]]
    assert len(steps) == 2 * 20
    assert steps == sorted(set(steps)), "the second stack must go on where the first ended"
    assert max(steps) == 2 * 40 - 1
    assert len([row for row in rows if row["fit/accuracy"]]) == 20
    (cell,) = [row for row in rows if row["cells/done"]]
    defended = metrics["accuracy"]["defended"]
    assert float(cell["cells/accuracy"]) == float(cell["result/paper/pgd/accuracy"]) == defended
    assert float(cell["cells/low"]) <= defended <= float(cell["cells/high"])
    assert float(cell["cells/seconds"]) >= float(cell["cells/seconds_per_image"]) > 0
    assert float(rows[-1]["result/accuracy/defended"]) == defended
    settings = yaml.safe_load((tmp_path / "logs" / "csv" / "session_0" / "hparams.yaml").read_text())
    assert (settings["defense/tau"], settings["attack/name"], settings["data/limit"]) == (0.2, "pgd", 2)
    assert settings["code"] == code_state()


def test_chunks_of_several_stacks_follow_each_other(tmp_path: Path) -> None:
    short = ("defense.stack_size=1", "defense.T=10", "defense.decisions=5", "chunk=2", "data.limit=4")
    tiny_run(tmp_path, *short, "figures=0", "logger=csv")
    steps = [int(row["step"]) for row in read_rows(tmp_path) if row["fit/mse"]]
    assert steps == [10 * stack + step for stack in range(4) for step in range(1, 10, 2)]


def test_an_installed_package_is_not_taken_for_the_repository_that_it_lies_in(tmp_path, monkeypatch) -> None:
    home = tmp_path / "site-packages"
    home.mkdir()
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), (*identity, "commit", "-q", "--allow-empty", "-m", "theirs")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(loggers, "CODE", home)
    assert code_state() is None
    monkeypatch.setattr(loggers, "CODE", tmp_path)
    assert code_state() is not None


@pytest.mark.slow
def test_another_session_has_a_log_of_its_own_with_all_rows(tmp_path: Path) -> None:
    for logger in ("none", "csv", "csv"):
        tiny_run(tmp_path, "data.limit=1", "figures=0", f"logger={logger}")
    first, second = (read_rows(tmp_path, session=n) for n in range(2))
    assert len([row for row in first if row["fit/mse"]]) == 20
    assert first == second


@pytest.mark.slow
def test_every_dip_has_curves_and_pictures_while_a_matrix_is_run(tmp_path: Path) -> None:
    tiny_evaluation(tmp_path, *DIPS, "logger=csv")
    rows = read_rows(tmp_path)
    assert [int(row["cells/done"]) for row in rows if row["cells/done"]] == list(range(1, 7))
    for defense, steps in {"paper": range(1, 20, 2), "mirror": (7, 11, 19, 23, 31, 35), "dip_fixed": range(8)}.items():
        for attack in ("clean", "pgd_8"):
            curve = [row for row in rows if row[f"fit/{defense}/{attack}/quality"]]
            assert [int(row["step"]) for row in curve] == list(steps)
            assert all(float(row[f"fit/{defense}/{attack}/mse"]) > 0 for row in curve)
            (cell,) = [row for row in rows if row[f"result/{defense}/{attack}/accuracy"]]
            assert rows.index(cell) > rows.index(curve[-1])
            assert (tmp_path / "figures" / f"panel_{defense}.{attack}.png").is_file()
            assert (tmp_path / "figures" / f"trace_{defense}.{attack}_000000.png").is_file() == (defense != "dip_fixed")
    assert len([row for row in rows if row["fit/mirror/pgd_8/accuracy"]]) == 6


def test_an_attack_that_equals_another_one_has_rows_of_its_own(tmp_path: Path) -> None:
    short = ("defense=dip_fixed", "defense.network=small", "defense.T=10", "defense.step=7", "data.limit=1")
    tiny_evaluation(tmp_path, *short, "figures=0", "~attacks.fgsm_8", "+attack@attacks.again=pgd", "logger=csv")
    rows = read_rows(tmp_path)
    assert [int(row["cells/done"]) for row in rows if row["cells/done"]] == [1, 2, 3]
    for attack in ("pgd_8", "again"):
        assert [int(row["step"]) for row in rows if row[f"fit/dip_fixed/{attack}/quality"]] == list(range(8))
        assert len([row for row in rows if row[f"result/dip_fixed/{attack}/accuracy"]]) == 1


@pytest.mark.slow
def test_tensorboard_holds_scalars_table_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = tiny_run(tmp_path, *SMALL, "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "session_0"))
    events.Reload()
    assert len(events.Scalars("fit/quality")) == 2 * 20
    assert events.Scalars("result/accuracy/undefended")[0].value == metrics["accuracy"]["undefended"]
    assert events.Scalars("cells/accuracy")[0].step == 1
    assert set(events.Tags()["images"]) == {"figures/panel", "figures/trace_000000"}
    assert any("images" in tag for tag in events.Tags()["tensors"])
    assert events.Scalars("hp_metric")[-1].value == pytest.approx(metrics["accuracy"]["defended"])


def test_no_log_is_no_log(matrix: Matrix) -> None:
    before = set(matrix.folder.rglob("*"))
    with open_log(logged(matrix, "logger=none")) as log:
        assert log is None
    assert set(matrix.folder.rglob("*")) == before


@pytest.mark.slow
def test_wandb_keeps_one_run_with_a_table_of_pictures(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    matrix = logged(matrix, "logger=wandb", "logger.tags=[a,b]", "logger.notes=why", "logger.artifacts=true")
    with open_log(matrix) as log:
        run(matrix, log=log)
        metrics = write_train_report(matrix, log=log)
        kept = Path(log.run.dir).parent
    assert wandb.run is None, "the run must not stay open for the next job of the process"
    (read,) = wandb_runs(matrix.folder)
    assert (read.name, read.job_type) == ("digits-digits_cnn-pgd-paper", "fit")
    assert (read.tags, read.notes, read.exit_code) == (["a", "b"], "why", 0)
    assert read.commit == str(read.config["code"]).removesuffix("-dirty")
    assert (read.config["defense/tau"], read.config["attack/name"]) == (0.2, "pgd")
    assert read.summary["result/accuracy/clean"] == metrics["accuracy"]["clean"]
    assert [row["_step"] for row in read.history] == list(range(len(read.history)))
    assert {path.name.split("_")[0] for path in kept.glob("files/media/images/figures/*.png")} == {"panel", "trace"}
    table = next(files for name, files in read.artifacts if name.endswith("-images"))
    content = yaml.safe_load(Path(table["images.table.json"]).read_text())
    assert len(content["data"]) == 3
    shown = [content["columns"].index(name) for name in ("clean", "given", "reconstruction")]
    for line in content["data"]:
        assert all(line[column]["_type"] == "image-file" and line[column]["path"] in table for column in shown)
    assert {"decision_given", "decision_defended", "why"} <= set(content["columns"])
    artifact = next(files for name, files in read.artifacts if name.startswith("reconstructions-"))
    assert "reconstructions/pgd/paper.npz" in artifact
    assert {path for path in artifact if path.startswith("traces/")} == {
        f"traces/pgd/paper/{i:06d}.safetensors" for i in range(3)
    }


@pytest.mark.slow
def test_rows_of_a_resumed_wandb_run_go_on_where_they_ended(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for last in (2, 2, 5):  # the second session has nothing to add
        with open_log(logged(matrix, "logger=wandb")) as log:
            for number in range(last):
                log.add(f"row {number}", {"fit/mse": 0.5}, step=10 * number)
    runs = wandb_runs(matrix.folder)
    assert len(runs) == 3
    assert len({one.id for one in runs}) == 1
    assert all(one.resumes for one in runs)
    lines = [line for one in runs for line in one.history]
    assert [(line["_step"], line["trainer/global_step"]) for line in lines] == [(n, 10 * n) for n in range(5)]
    changed = replace(matrix, config=replace(matrix.config, seed=1))
    for other in (logged(changed, "logger=wandb"), logged(changed, "logger=wandb", "logger.project=thesis")):
        with open_log(other) as log:
            log.add("row 0", {"fit/mse": 0.5}, step=0)
    others = [one for one in wandb_runs(matrix.folder) if one.id != runs[0].id]
    assert len({one.id for one in others}) == 2, "other settings, or another project, are another run"
    assert [[line["_step"] for line in one.history] for one in others] == [[0], [0]]


@pytest.mark.slow
def test_one_id_in_the_environment_is_that_of_a_single_run_alone(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "ofmyjob")
    fresh_settings()
    try:
        for group in ("sweep", None):  # else the job would go on with the run of the folder
            with open_log(logged(matrix, "logger=wandb"), group=group) as log:
                log.add("row", {"fit/mse": 0.5}, step=0)
    finally:
        monkeypatch.undo()
        fresh_settings()
    alone, job = sorted(wandb_runs(matrix.folder), key=lambda one: one.id != "ofmyjob")
    assert alone.id == "ofmyjob" != job.id
    assert (alone.group, job.group) == ("", "sweep")


@pytest.mark.slow
def test_a_disabled_wandb_run_leaves_nothing_to_go_on_with(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("disabled", "dryrun"):
        monkeypatch.setenv("WANDB_MODE", mode)
        fresh_settings()
        with open_log(logged(matrix, "logger=wandb")) as log:
            log.add("row", {"cells/done": 1, "cells/accuracy": 0.5})
    (read,) = wandb_runs(matrix.folder)  # that of dryrun, W&B's old name of offline
    assert [line["_step"] for line in read.history] == [0]
    assert ("cells/done", "cells/accuracy") in read.axes


def test_a_row_is_entered_once(matrix: Matrix) -> None:
    with open_log(logged(matrix, "logger=csv")) as log:
        for value in (1.0, 2.0):
            log.add("one", {"x": value}, step=3)
    assert read_rows(matrix.folder) == [{"step": "3", "x": "1.0"}]


def test_the_end_of_a_run_has_one_key_in_whatever_order_its_cells_were_finished(tmp_path: Path) -> None:
    jpeg = ("defense=jpeg", "data.limit=1", "figures=0", "logger=csv")
    tiny_evaluation(tmp_path, *jpeg)
    matrix, ends = tiny_matrix(tmp_path, *jpeg), []
    matrix.load()
    for cells in (matrix.cells, matrix.cells[::-1]):
        with open_log(matrix) as log:
            for cell in cells:
                log.finished(cell)
            log.results({}, [])
            ends.append({key for key in log.keys if key.startswith("result ")})
    assert ends[0] == ends[1]
    assert len(ends[0]) == 1


def test_names_say_what_a_run_is() -> None:
    folder = Path("sweep") / "tau=0.5,K=15-0123abcd"
    assert run_name(typed_config(), folder, group=None) == "digits-digits_cnn-pgd-mirror"
    assert run_name(typed_matrix(), folder, group=None) == "digits-digits_cnn-3 attacks x 6 defences"
    assert run_name(typed_matrix("defense=paper"), folder, group=None) == "digits-digits_cnn-3 attacks x paper"
    assert run_name(typed_config(), folder, group="sweep") == "tau=0.5,K=15"


def test_a_job_of_a_sweep_is_named_by_what_it_differs_in(tmp_path: Path) -> None:
    same = ["data.limit=2", "defense=paper", "logger=wandb"]
    overrides = {"a-0123abcd": [*same, "defense.tau=0.5"], "b-0123abcd": [*same, "defense.tau=0.7", "seed=1"]}
    jobs = [{"folder": name, "overrides": given} for name, given in overrides.items()]
    write_json(tmp_path / "sweep.json", {"jobs": jobs})
    names = [run_name(typed_config(), tmp_path / folder, group="sweep") for folder in (*overrides, "c-0123abcd")]
    assert names == ["tau=0.5", "tau=0.7,seed=1", "c"]


def test_settings_are_flat_and_have_no_dots() -> None:
    settings = flat_settings(typed_matrix("defense=paper"))
    assert settings["defense/tau"] == 0.7
    assert settings["attacks/pgd_8/eps_255"] == 8
    assert not [key for key, value in settings.items() if "." in key or (isinstance(value, dict) and value)]
    assert not [key for key in settings if key.startswith("logger")]


KEY = {"WANDB_API_KEY": "0" * 40}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "env", "offline", "mode"),
    [
        (None, {}, None, "offline"),
        (None, KEY, None, "online"),
        (None, {}, False, "online"),
        (None, KEY, True, "offline"),
        (None, KEY | {"WANDB_MODE": "disabled"}, None, "disabled"),
        (None, KEY | {"WANDB_MODE": "dryrun"}, None, "dryrun"),
        ("offline", KEY, None, "offline"),
        ("disabled", KEY, None, "disabled"),
        ("offline", KEY, False, "online"),
    ],
)
def test_mode_is_that_of_wandbs_own_settings_but_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, env: dict, offline: bool | None, mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "nowhere")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if file is not None:  # what `wandb offline` and `wandb disabled` write
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {file}\n")
    fresh_settings()
    try:
        assert wandb_mode(offline) == mode
    finally:
        monkeypatch.undo()
        fresh_settings()
