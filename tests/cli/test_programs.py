"""``dipguard train``, ``evaluate`` and ``sweep``: the Hydra programs from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from dipguard.cli.main import PROGRAMS, make_parser
from dipguard.cli.programs import _make_absolute, evaluate
from tests.tiny_matrix import compose_matrix
from tests.tiny_run import ROOT


def call(*arguments: str, folder: Path, line: str | None = None) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **({} if line is None else {"COMP_LINE": line})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)


def test_the_help_of_the_command_names_them() -> None:
    text = make_parser().format_help()
    assert all(f"    {name} " in text for name in PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("defense=mi", {"defense=mirror"}),
        ("victim=cifar10_resnet5", {"victim=cifar10_resnet50", "victim=cifar10_resnet56"}),
        ("defense=paper defense.ta", {"defense.tau="}),
        ("+sweep=sm", {"+sweep=smoke"}),
    ],
)
def test_a_shell_completes_groups_options_and_keys(tmp_path: Path, typed: str, offered: set[str]) -> None:
    script = call(str(ROOT / "evaluate.py"), "-sc", "query=bash", folder=tmp_path, line=f"python evaluate.py {typed}")
    assert set(script.stdout.split()) == offered
    for program in ("train", "sweep"):
        command = call("-m", "dipguard", "-sc", "query=bash", folder=tmp_path, line=f"dipguard {program} {typed}")
        assert set(command.stdout.split()) == offered


@pytest.mark.slow
def test_a_shell_completes_the_programs(tmp_path: Path) -> None:
    found = call("-m", "dipguard", "-sc", "query=bash", folder=tmp_path, line="dipguard tr")
    assert found.stdout.split() == list(PROGRAMS)
    script = call("-m", "dipguard", "-sc", "install=bash", folder=tmp_path)
    assert "hydra_bash_completion" in script.stdout


def test_a_node_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException, match=r"`attack\.name` must be one of none"):
        evaluate(compose_matrix("++attack.eps_255=4"), tmp_path)


def test_a_rebuild_without_a_finished_cell_changes_nothing(tmp_path: Path) -> None:
    fast = ("data.limit=2", "attack=fgsm", "defense=jpeg", "figures=0", "trainer.enable_progress_bar=false")
    evaluate(compose_matrix(*fast), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert evaluate(compose_matrix(*fast, "rebuild=true"), tmp_path)
    with pytest.raises(CompactHydraException, match="`rebuild` found no finished cell of these settings"):
        evaluate(compose_matrix(*fast, "defense.quality=20", "rebuild=true"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_a_sweep_with_the_command_and_an_error_of_it(tmp_path: Path) -> None:
    fast = ("data.limit=2", "attack=fgsm", "defense=jpeg", "figures=0", "trainer.enable_progress_bar=false")
    done = call("-m", "dipguard", "sweep", *fast, "defense.quality=30,90", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 done." in done.stdout
    assert (tmp_path / "outputs" / "sweeps" / "evaluate" / "report.md").is_file()
    shown = call("-m", "dipguard", "sweep", "+sweep=smoke", "--cfg", "job", "-p", "defense.tau", folder=tmp_path)
    assert shown.stdout.strip() == "0.5"
    refused = call("-m", "dipguard", "train", "defense.taau=1", folder=tmp_path)
    assert refused.returncode == 1
    assert "`defense.taau` is unknown" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_paths_are_made_absolute_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.pt").touch()
    (tmp_path / "test").mkdir()
    given = {
        "store": "fits",
        "data": {"name": "cifar10", "path": "cifar", "split": "test"},
        "victim": {"_target_": "my.build", "path": "hub/net", "checkpoint": "own.pt", "weights": "DEFAULT"},
    }
    config = OmegaConf.create(given)
    monkeypatch.chdir(tmp_path)
    _make_absolute(config, tmp_path)
    expected = {**given, "store": str(tmp_path / "fits")}
    expected["data"] = {**given["data"], "path": str(tmp_path / "cifar")}
    expected["victim"] = {**given["victim"], "checkpoint": str(tmp_path / "own.pt")}
    assert OmegaConf.to_container(config) == expected


def test_interpolated_paths_are_made_absolute_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.pt").touch()
    for name, value in {"ELSEWHERE": str(tmp_path / "scratch"), "NEAR": "fits", "OWN": "own.pt"}.items():
        monkeypatch.setenv(name, value)
    given = {
        "store": "${oc.env:ELSEWHERE}/store",
        "data": {"name": "cifar10", "path": "${oc.env:NEAR}/cifar"},
        "victim": {"weights": "${oc.env:OWN}", "arch": "${oc.env:MISSING}", "size": "???"},
    }
    config = OmegaConf.create(given)
    _make_absolute(config, tmp_path)
    assert config.store == str(tmp_path / "scratch" / "store")
    assert config.data.path == str(tmp_path / "fits" / "cifar")
    assert OmegaConf.to_container(config.victim) == {**given["victim"], "weights": str(tmp_path / "own.pt")}
