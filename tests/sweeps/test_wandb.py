"""Jobs in W&B: real offline runs, read back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from dipguard.defenses import Defense
from tests.sweeps.tiny_sweep import environment, run_sweep
from tests.sweeps.wandb_reader import Run, read_run
from tests.tiny_matrix import TINY, tiny_evaluation
from tests.tiny_run import ROOT

ONE_DEFENSE = (
    "~defenses.none", "~defenses.jpeg", "~defenses.median", "~defenses.dip_fixed", "~defenses.mirror",
    "~attacks.fgsm_8",
)  # fmt: skip


def runs_in(folder: Path) -> list[Run]:
    return [read_run(path) for path in sorted(folder.glob("**/logs/wandb/offline-run-*"))]


@pytest.mark.slow
def test_two_jobs_of_one_process_are_two_runs_with_all_that_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "betas"
    run_sweep(folder, *TINY, *ONE_DEFENSE, "logger=wandb", "defenses.paper.beta=0.1,0.9")
    assert wandb.run is None
    wandb.teardown()  # all is written
    runs = runs_in(folder)
    assert len({run.id for run in runs}) == len(runs) == 2
    assert {run.config["defense/beta"] for run in runs} == {0.1, 0.9}
    assert {run.name.rsplit(",", 1)[-1] for run in runs} == {"beta=0.1", "beta=0.9"}
    for run in runs:
        assert (run.group, run.job_type, run.exit_code) == ("betas", "sweep", 0)
        assert run.config["data/limit"] == 5
        assert ("trainer/global_step", "*") in run.axes
        for column in ("clean", "pgd_8"):
            for name in ("quality", "mse", "decision_changed", "accuracy"):
                sampled = [line for line in run.history if f"fit/paper/{column}/{name}" in line]
                assert [line["trainer/global_step"] for line in sampled] == list(range(1, 20, 2))
                assert all(-1 <= line[f"fit/paper/{column}/{name}"] <= 1 for line in sampled)
        cells = [line for line in run.history if "cells/done" in line]
        assert [line["cells/done"] for line in cells] == [1, 2]
        assert {("cells/done", f"cells/{name}") for name in ("accuracy", "low", "high", "ssim", "seconds")} <= {
            *run.axes
        }
        assert cells[0]["_runtime"] < cells[1]["_runtime"]
        table = {key.split("/")[1]: value for key, value in run.history[-1].items() if key.startswith("images/")}
        assert (table["nrows"], table["_type"]) == (2 * 5, "table-file")
        for column, line in zip(("clean", "pgd_8"), cells, strict=True):
            pictures = {key.split("/")[-2] for key in line if key.startswith(f"figures/paper/{column}/")}
            assert pictures == {"panel", "trace_000000", "trace_000001"}
        for name in ("accuracy", "low", "high", "ssim", "psnr"):
            assert f"result/paper/pgd_8/{name}" in run.summary
        means = [run.summary[f"result/paper/{column}/accuracy"] for column in ("clean", "pgd_8")]
        assert run.summary["result/paper/mean_accuracy"] == pytest.approx(sum(means) / 2)
        assert run.summary["objective"] == pytest.approx(sum(means) / 2)
        assert sum("objective" in line for line in run.history) == 1, "no running mean for a search to take the best of"
        assert {"results.csv", "evaluate.log"} <= run.files


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_one_run_that_goes_on(tmp_path: Path) -> None:
    """SIGTERM in the middle of a matrix; then the same command again."""
    given = ("~defenses.none", "~defenses.jpeg", "~defenses.median", "~attacks.fgsm_8", "logger=wandb")
    long = ("defenses.mirror.T=100", "defenses.mirror.t0=20", f"hydra.run.dir={tmp_path / 'run'}")
    command = [sys.executable, str(ROOT / "evaluate.py"), *TINY, *given, *long]
    env = {**environment(), "WANDB_MODE": "offline"}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal, wanted = tmp_path / "run" / "logs" / "wandb_run.txt", time.monotonic() + 300
    while not (journal.is_file() and len(journal.read_text().splitlines()) > 30) and time.monotonic() < wanted:
        time.sleep(0.02)
    first.terminate()
    assert first.wait() == 143
    for _ in range(2):  # the second finds all done
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    runs = runs_in(tmp_path)
    assert [run.exit_code for run in runs] == [1, 0, 0]
    assert len({run.id for run in runs}) == 1
    assert runs[0].history
    assert runs[1].history
    assert runs[2].history == []
    lines = [line for run in runs for line in run.history]
    steps = [line["_step"] for line in lines]
    assert steps == sorted(set(steps))
    assert [line["cells/done"] for line in lines if "cells/done" in line] == list(range(1, 7))
    curves = [(key, line["trainer/global_step"]) for line in lines for key in line if key.startswith("fit/")]
    assert len(curves) == len(set(curves))
    for defense in ("paper", "mirror", "dip_fixed"):
        for attack in ("clean", "pgd_8"):
            assert (f"fit/{defense}/{attack}/quality", 7) in curves or (f"fit/{defense}/{attack}/quality", 99) in curves
            assert all(f"result/{defense}/{attack}/accuracy" in run.summary for run in runs[1:])


class Falls(Defense):
    """A defence that falls off the bus."""

    name = "falls"

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        raise RuntimeError("as cards do")


@pytest.mark.slow
def test_a_run_with_a_cell_that_failed_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    others = [f"~defenses.{name}" for name in ("none", "median", "dip_fixed", "paper", "mirror")]
    falls = f"+defenses.falls._target_={__name__}.Falls"
    with pytest.raises(RuntimeError, match=r"2 cells failed, all others are stored: .*as cards do"):
        tiny_evaluation(tmp_path, *others, "~attacks.fgsm_8", falls, "data.limit=2", "figures=0", "logger=wandb")
    assert wandb.run is None
    (run,) = runs_in(tmp_path)
    assert run.exit_code == 1
    assert "result/jpeg/pgd_8/accuracy" in run.summary


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_neither_stops_nor_fails_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    from dipguard.reporting import loggers

    wandb.teardown()  # so that it reads the environment again
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(loggers.WANDB_SETTINGS, "init_timeout", 3.0)
    start = time.monotonic()
    tiny_evaluation(tmp_path, *ONE_DEFENSE, "data.limit=2", "figures=0", "logger=wandb")
    assert time.monotonic() - start < 120
    wandb.teardown()  # all is written, and the next test does not meet these settings
    assert (tmp_path / "results.csv").is_file()
    assert "kept offline" in caplog.text
    (run,) = runs_in(tmp_path)
    assert run.job_type == "evaluate"
    assert "result/paper/mean_accuracy" in run.summary


@pytest.mark.slow
def test_the_agent_of_wandb_drives_evaluate(tmp_path: Path) -> None:
    """All but the server, which tells the agent what to try."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb_sweep.yaml").read_text())
    rules = sweep["parameters"].items()
    parameters = {name: rule["values"][0] if "values" in rule else rule["min"] for name, rule in rules}
    common = [text for text in TINY if not text.startswith("defenses.")]
    tiny = [*common, "defense.T=20", "defense.decisions=10", "defense.t0=2", "~attacks.fgsm_8"]
    script = ROOT / "tests" / "sweeps" / "wandb_agent_script.py"
    arguments = [str(ROOT / "sweeps" / "wandb_sweep.yaml"), "run7", json.dumps(tiny), json.dumps(parameters)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the agent starts `python`
    given = {**environment(), "WANDB_MODE": "offline", "PATH": path}
    ended = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, env=given, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "outputs" / "wandb" / "run7" / "results.csv").is_file()
    (run,) = runs_in(tmp_path)
    assert (run.id, run.exit_code, run.name) == ("run7", 0, "")
    assert {name: run.config[name.replace(".", "/")] for name in parameters} == parameters
    assert 0 <= run.summary[sweep["metric"]["name"]] <= 1
