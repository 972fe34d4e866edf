"""Sweeps in processes of their own: killed and gone on with, and with launchers that run jobs elsewhere."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.sweeps.tiny_sweep import FAST, GRID, call, command, done_times, environment


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_exit_code_tells_of_a_failed_job(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    arguments = command(folder, *FAST, "~attacks.pgd_8", "defense.quality=20,40,0,60,80")
    first = subprocess.Popen(
        arguments, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 900
    while not done_times(folder) and first.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    first.kill()
    first.wait()
    before = done_times(folder)
    assert 0 < len(before) < 4, "the kill came too late"
    again = call(arguments, tmp_path)
    after = done_times(folder)
    assert again.returncode == 1, again.stderr
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert "5 jobs: 4 done, 1 failed." in again.stdout
    assert "defense.quality" in (folder / "report.md").read_text()
    assert {"sweep.csv", "figure6_mean.png"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin", "option"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher", "hydra.launcher.n_jobs=2"),
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher", "hydra.launcher.timeout_min=10"),
    ],
)
def test_other_launchers(tmp_path: Path, launcher: str, plugin: str, option: str) -> None:
    pytest.importorskip(plugin, reason="needs the extra `sweep`")
    folder = tmp_path / "sweep"
    done = call(command(folder, *FAST, GRID[0], f"hydra/launcher={launcher}", option), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done_times(folder)) == 2
    assert "2 jobs: 2 done." in done.stdout
    assert (folder / "figure6_mean.png").is_file()
