"""dipguard's config groups in somebody else's Hydra application."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf

from hydra_plugins.dipguard_groups import DipguardSource

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "examples" / "hydra_project"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Their configuration; it has a group of its own that is called like one of dipguard's."""
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "pgd.yaml").write_text("theirs: true\n")
    (tmp_path / "dipguard" / "rival").mkdir(parents=True)
    (tmp_path / "dipguard" / "rival" / "jpeg.yaml").write_text("name: jpeg\noptions: {quality: 10}\n")
    (tmp_path / "config.yaml").write_text("defaults: [attack: pgd, dipguard/attack: fgsm, _self_]\nlr: 0.1\n")
    return tmp_path


def composed(conf: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)))


def test_groups_stand_beside_theirs_and_not_in_their_way(conf: Path) -> None:
    assert composed(conf) == {
        "attack": {"theirs": True},
        "dipguard": {"attack": OmegaConf.load(ROOT / "conf" / "attack" / "fgsm.yaml")},
        "lr": 0.1,
    }


def test_groups_can_be_put_elsewhere_and_changed(conf: Path) -> None:
    found = composed(conf, "dipguard/attack=pgd", "+dipguard/rival@defense=paper", "defense.options.T=7")
    assert found["dipguard"]["attack"]["name"] == "pgd"
    assert found["defense"]["options"]["T"] == 7
    assert found["attack"] == {"theirs": True}


def test_a_config_of_their_own_comes_first(conf: Path) -> None:
    assert composed(conf, "+dipguard/rival=jpeg")["dipguard"]["rival"]["options"] == {"quality": 10}
    assert composed(conf, "+dipguard/rival=median")["dipguard"]["rival"]["name"] == "median"


def test_all_groups_are_offered_but_those_of_dipguards_own_programs() -> None:
    source = DipguardSource("dipguard", "dipguard://")
    assert source.list("", ObjectType.GROUP) == ["dipguard"]
    groups = source.list("dipguard", ObjectType.GROUP)
    assert {"attack", "data", "network", "rival", "victim"} <= set(groups)
    assert set(groups).isdisjoint({"experiment", "sweep"})
    assert source.list("dipguard", ObjectType.CONFIG) == []
    for group in groups:
        files = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        assert source.list(f"dipguard/{group}", ObjectType.CONFIG) == files
        for name in files:
            loaded = source.load_config(f"dipguard/{group}/{name}").config
            assert loaded == OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
    for path in ("dipguard/experiment/figure4", "dipguard/train", "dipguard/rival/nothing", "rival/paper"):
        assert not source.exists(path)
        with pytest.raises(ConfigLoadError, match=path):
            source.load_config(path)


def test_the_choices_are_listed_when_one_is_wrong(conf: Path) -> None:
    with pytest.raises(HydraException, match="median"):
        composed(conf, "+dipguard/rival=nothing")


def run(command: list[str], *, folder: Path, path: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_project_runs(tmp_path: Path) -> None:
    """As from the command line, with another defence than its config names."""
    overrides = ["images=6", f"hydra.run.dir={tmp_path}", "dipguard/rival@defense=median", "model.epochs=1"]
    lines = run([sys.executable, "main.py", *overrides], folder=PROJECT).splitlines()
    assert [line.split(":")[0] for line in lines] == ["clean", "attacked", "purified"]
    assert all(line.endswith(" of 6") for line in lines)


@pytest.mark.slow
def test_the_example_project_runs_with_its_own_defaults(tmp_path: Path) -> None:
    quick = ["images=2", "defense.options.T=20", "+defense.options.decisions=10", f"hydra.run.dir={tmp_path}"]
    assert "purified: " in run([sys.executable, "main.py", *quick], folder=PROJECT)


def test_finding_the_groups_does_not_import_dipguard(conf: Path) -> None:
    code = (
        "import sys; from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(conf)!r}, version_base='1.3'):\n"
        "    print(compose('config').dipguard.attack.name)\n"
        "assert 'dipguard' not in sys.modules and 'torch' not in sys.modules\n"
    )
    assert run([sys.executable, "-c", code], folder=conf).strip() == "fgsm"


@pytest.mark.slow
def test_an_installed_wheel_offers_them_too(conf: Path, tmp_path: Path) -> None:
    """Without the source tree: by the plugin, and by Hydra's own pkg://."""
    built, target = tmp_path / "built", tmp_path / "site"
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)], folder=ROOT, path=tmp_path)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    code = (
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(conf)!r}, version_base='1.3'):\n"
        "    print(compose('config', ['+dipguard/rival@d=paper', 'hydra.searchpath=[pkg://dipguard.conf]', "
        "'+victim=digits_cnn']).d.name)\n"
        "import importlib.util; print(importlib.util.find_spec('dipguard').origin)\n"
    )
    name, origin = run([sys.executable, "-c", code], folder=conf, path=target).splitlines()
    assert name == "paper"
    assert Path(origin).is_relative_to(target)
