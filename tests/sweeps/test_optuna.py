"""A sweep that Optuna steers: real trials, resumed."""

from pathlib import Path

import pytest
import yaml

from dipguard.evaluation.sweep_job import objective
from tests.sweeps.tiny_sweep import done_times, run_sweep

TINY = ("data.limit=2", "defense.T=40", "defense.decisions=20", "hydra.sweeper.n_trials=4", "trainer.accelerator=cpu")


@pytest.mark.slow
def test_optuna_finds_the_best_of_its_trials_with_one_set_of_fits_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `sweep`")
    folder = tmp_path / "sweep"
    run_sweep(folder, "+sweep=optuna", *TINY, "objective=pgd_8")
    jobs = done_times(folder)
    assert len(jobs) == 4
    for name in ("tau", "t0", "K", "beta"):
        assert len({text for job in jobs for text in job.split(",") if text.startswith(f"{name}=")}) > 1
    assert len(list((folder / "store" / "traces").rglob("*.npz"))) == 2 * 2, "clean and attacked images once"
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert set(found["best_params"]) == {f"defense.{name}" for name in ("tau", "t0", "K", "beta")}
    assert found["best_value"] == max(objective(folder / job, "pgd_8") or 0 for job in jobs)
    assert "4 jobs: 4 done." in (folder / "report.md").read_text()

    run_sweep(folder, "+sweep=optuna", *TINY, "objective=pgd_8", "hydra.sweeper.n_trials=5")
    again = done_times(folder)
    assert len(again) == 5
    assert {name: again[name] for name in jobs} == jobs, "the same trials are asked for, and are done"
