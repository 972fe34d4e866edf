from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from dipguard.evaluation import Matrix
from dipguard.reporting import open_log, write_train_report
from dipguard.reporting.loggers import wandb_mode
from tests.tiny_run import tiny_run

SMALL = ("data.limit=2", "chunk=1")
WANDB = {"name": "wandb", "project": "dipguard", "entity": None, "group": None, "offline": None}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_curves_of_all_stacks_and_the_result(tmp_path: Path) -> None:
    metrics = tiny_run(tmp_path, *SMALL, "figures=0", "logger=csv")
    rows = read_rows(tmp_path / "logs" / "csv" / "session_0" / "metrics.csv")
    steps = [int(row["step"]) for row in rows if row["fit/mse"]]
    assert len(steps) == 2 * 20
    assert steps == sorted(set(steps)), "the second stack must go on where the first ended"
    assert max(steps) == 2 * 40 - 1
    assert float(rows[-1]["result/accuracy.defended"]) == metrics["accuracy"]["defended"]
    assert "defenses.paper.tau: 0.2" in (tmp_path / "logs" / "csv" / "session_0" / "hparams.yaml").read_text()


def test_second_session_leaves_the_first_ones_log(tmp_path: Path) -> None:
    for _ in range(2):
        tiny_run(tmp_path, "data.limit=1", "figures=0", "logger=csv")
    assert len(read_rows(tmp_path / "logs" / "csv" / "session_0" / "metrics.csv")) == 20 + 1
    assert len(read_rows(tmp_path / "logs" / "csv" / "session_1" / "metrics.csv")) == 1


@pytest.mark.slow
def test_tensorboard_holds_scalars_table_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = tiny_run(tmp_path, *SMALL, "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "session_0"))
    events.Reload()
    assert len(events.Scalars("fit/quality")) == 2 * 20
    assert events.Scalars("result/accuracy.undefended")[0].value == metrics["accuracy"]["undefended"]
    assert set(events.Tags()["images"]) == {"figures/panel", "figures/trace_000000"}
    assert any("images" in tag for tag in events.Tags()["tensors"])


def test_no_log_is_no_log(tmp_path: Path) -> None:
    with open_log({"name": "none"}, tmp_path, settings={}) as log:
        assert log is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_and_closes_it(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_log(WANDB, matrix.folder, settings=matrix.config.to_dict()) as log:
        assert log is not None
        for stack in range(2):
            trainers = log.starting_at(stack * 40)
            trainers.log_metrics({"fit/mse": 0.5}, step=39)
            trainers.finalize("success")
        metrics = write_train_report(matrix, log=log)
        run = log.inner.experiment
        assert run.summary["result/accuracy.clean"] == metrics["accuracy"]["clean"]
    runs = list((matrix.folder / "logs" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert runs[0].name.endswith((matrix.folder / "logs" / "wandb_id.txt").read_text())
    assert [path.name for path in runs[0].glob("*.wandb")]
    assert {path.name.split("_")[0] for path in runs[0].glob("files/media/images/figures/*.png")} == {"panel", "trace"}
    assert wandb.run is None, "the run must not stay open for the next job of the process"


@pytest.mark.slow
def test_wandb_run_is_closed_when_the_job_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")

    def fail() -> None:
        with open_log(WANDB, tmp_path, settings={}):
            raise RuntimeError("the job failed")

    with pytest.raises(RuntimeError, match="the job failed"):
        fail()
    assert wandb.run is None


@pytest.mark.parametrize(
    ("own", "key", "offline", "mode"),
    [
        ("online", None, None, "offline"),
        ("online", "x" * 40, None, "online"),
        ("online", None, False, "online"),
        ("online", "x" * 40, True, "offline"),
        ("disabled", "x" * 40, None, "disabled"),
        ("dryrun", "x" * 40, None, "dryrun"),
        ("offline", "x" * 40, None, "offline"),
    ],
)
def test_mode_is_that_of_wandbs_own_settings_but_offline_without_a_key(
    monkeypatch: pytest.MonkeyPatch, own: str, key: str | None, offline: bool | None, mode: str
) -> None:
    settings = SimpleNamespace(mode=own, api_key=key, base_url="https://api.wandb.ai")
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setenv("NETRC", "nowhere")
    assert wandb_mode(offline) == mode
