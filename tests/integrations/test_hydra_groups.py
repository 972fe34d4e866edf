"""dipguard's config groups in another Hydra application."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf

from dipguard import registry
from dipguard.config import GROUPS, node_of
from dipguard.data import load_data
from hydra_plugins.dipguard_groups import DipguardSource

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "examples" / "hydra_project"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Their configuration; it has a group of its own that is called like one of dipguard's."""
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "pgd.yaml").write_text("theirs: true\n")
    (tmp_path / "dipguard" / "defense").mkdir(parents=True)
    (tmp_path / "dipguard" / "defense" / "jpeg.yaml").write_text("name: jpeg\nquality: 10\n")
    (tmp_path / "config.yaml").write_text("defaults: [attack: pgd, dipguard/attack: fgsm, _self_]\nlr: 0.1\n")
    return tmp_path


def composed(conf: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)))


def test_groups_stand_beside_theirs_and_not_in_their_way(conf: Path) -> None:
    assert composed(conf) == {
        "attack": {"theirs": True},
        "dipguard": {"attack": {"name": "fgsm", "eps_255": 8, "batch_size": 64}},
        "lr": 0.1,
    }


def test_groups_can_be_put_elsewhere_and_changed(conf: Path) -> None:
    found = composed(conf, "dipguard/attack=pgd", "+dipguard/defense@defense=paper", "defense.T=7")
    assert found["dipguard"]["attack"]["name"] == "pgd"
    assert found["defense"]["T"] == 7
    assert found["attack"] == {"theirs": True}


def test_a_config_of_their_own_comes_first(conf: Path) -> None:
    assert composed(conf, "+dipguard/defense=jpeg")["dipguard"]["defense"] == {"name": "jpeg", "quality": 10}
    assert composed(conf, "+dipguard/defense=median")["dipguard"]["defense"] == {"name": "median", "size": 3}


def test_a_groups_keys_are_the_builders_arguments(conf: Path) -> None:
    assert len(load_data(**composed(conf, "+dipguard/data@d=digits")["d"])) == 16


def test_what_depends_on_the_data_has_a_default_without_them(conf: Path) -> None:
    assert composed(conf, "+dipguard/defense@d=mirror")["d"]["mirror"] == "${oc.select:data.mirrors,true}"
    with initialize_config_dir(str(conf), version_base="1.3"):
        assert compose("config", ["+dipguard/defense@d=mirror"]).d.mirror is True


def test_all_groups_are_offered_but_those_of_dipguards_own_programs() -> None:
    source = DipguardSource("dipguard", "dipguard://")
    assert source.list("", ObjectType.GROUP) == ["dipguard"]
    groups = source.list("dipguard", ObjectType.GROUP)
    assert {"attack", "data", "defense", "victim"} <= set(groups)
    assert set(groups).isdisjoint({"experiment", "logger", "sweep"})
    assert source.list("dipguard", ObjectType.CONFIG) == []
    for group in groups:
        files = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        assert source.list(f"dipguard/{group}", ObjectType.CONFIG) == files
        for name in files:
            loaded = source.load_config(f"dipguard/{group}/{name}").config
            own = GROUPS[group].own if group in GROUPS else {}
            written = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
            assert loaded == OmegaConf.masked_copy(written, [key for key in written if key not in own])
            if group in GROUPS:
                options = source.load_config(f"dipguard/{group}/options/{name}").config
                assert options == {key: value for key, value in node_of(group, name).items() if key not in own}
    for path in ("dipguard/experiment/figure4", "dipguard/train", "dipguard/defense/nothing", "defense/paper"):
        assert not source.exists(path)
        with pytest.raises(ConfigLoadError, match=path):
            source.load_config(path)
    assert not source.exists("dipguard/defense/options/nothing")


def test_the_choices_are_listed_when_one_is_wrong(conf: Path) -> None:
    with pytest.raises(HydraException, match="median"):
        composed(conf, "+dipguard/defense=nothing")


def test_what_another_package_registers_is_offered_too(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("theirs", "dipguard.defenses.transforms:JPEG", "dipguard.defenses")])
    monkeypatch.setattr(registry, "_registered", registry._registered.__wrapped__)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))
    found = composed(conf, "+dipguard/defense@d=theirs", "d.quality=20")["d"]
    assert found == {"name": "theirs", "quality": 20}
    source = DipguardSource("dipguard", "dipguard://")
    assert "theirs" in source.list("dipguard/defense", ObjectType.CONFIG)
    assert "theirs" not in source.list("dipguard/attack", ObjectType.CONFIG)


def run(command: list[str], *, folder: Path, path: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense",
    [
        ["median"],
        ["mirror", "defense.mirror=false", "defense.T=20", "defense.t0=5", "defense.every=5"],  # no mirrored digits
    ],
    ids=["median", "mirror"],
)
def test_the_example_project_runs(tmp_path: Path, defense: list[str]) -> None:
    """As from the command line, with another defence than its config names."""
    name, *options = defense
    overrides = ["images=6", f"hydra.run.dir={tmp_path}", "model.epochs=1"]
    overrides += [f"dipguard/defense@defense={name}", *options]
    told = run([sys.executable, "main.py", *overrides], folder=PROJECT).splitlines()
    lines = [line for line in told if not line.startswith("[")]  # without the log
    assert [line.split(":")[0] for line in lines] == ["clean", "attacked", "purified"]
    assert all(line.endswith(" of 6") for line in lines)


@pytest.mark.slow
def test_the_example_project_runs_with_its_own_defaults(tmp_path: Path) -> None:
    quick = ["images=2", "defense.T=20", "defense.decisions=10", f"hydra.run.dir={tmp_path}"]
    assert "purified: " in run([sys.executable, "main.py", *quick], folder=PROJECT)


@pytest.mark.parametrize(
    ("config", "absent"), [("plain", "dipguard"), pytest.param("config", "torch", marks=pytest.mark.slow)]
)
def test_little_is_imported(conf: Path, config: str, absent: str) -> None:
    """Nothing of dipguard unless its groups are used, and never torch."""
    (conf / "plain.yaml").write_text("lr: 0.1\n")
    code = (
        "import sys; from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(conf)!r}, version_base='1.3'):\n"
        f"    print(compose({config!r}).lr)\n"
        f"assert {absent!r} not in sys.modules\n"
    )
    assert run([sys.executable, "-c", code], folder=conf).strip() == "0.1"
