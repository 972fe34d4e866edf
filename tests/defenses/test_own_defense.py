"""docs/new_defense.md and examples/own_defense: a defence from outside the package."""

import importlib
import tomllib
from pathlib import Path

import pytest
import torch

from dipguard.defenses import DEFENSES, Defense, build_defense
from dipguard.registry import options_of, table_of
from tests.docs_blocks import blocks, run_python

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_defense"
GUIDE = ROOT / "docs" / "new_defense.md"


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.fixture
def installed(importable, monkeypatch, tmp_path):
    """What `pip install examples/own_defense` leaves for `importlib.metadata`."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = tmp_path / "own_defense-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    rows = project["entry-points"]["dipguard.defenses"].items()
    lines = ["[dipguard.defenses]", *(f"{name} = {path}" for name, path in rows)]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)


def test_the_guide_runs_and_shows_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_python(GUIDE, instead={}) == 3
    assert blocks(GUIDE)[0].code == (EXAMPLE / "own_defense.py").read_text(encoding="utf-8")
    (toml,) = [block.code for block in blocks(GUIDE) if block.language == "toml"]
    assert toml in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("importable")
def test_it_is_a_defence(images, victim):
    defense = importlib.import_module("own_defense").RandomResize(victim, smallest=0.5, seed=3)
    assert isinstance(defense, Defense)
    own = {"name": "random_resize", "class": "own_defense.RandomResize", "seed": 3, "smallest": 0.5}
    assert defense.settings == own | {"code": defense.settings["code"]}
    result = defense.defend(images[:3], indices=[7, 0, 2])
    assert torch.equal(defense.purify(images[1:2], indices=[0]), result.reconstructions[1:2])
    assert not torch.equal(defense.purify(images[1:2], indices=[1]), result.reconstructions[1:2])
    assert len(result.decisions_after) == 3


@pytest.mark.usefixtures("installed")
def test_an_entry_point_makes_it_one_of_the_defences(victim):
    table = table_of("defenses", DEFENSES)
    assert list(table) == [*DEFENSES, "random_resize"]
    assert build_defense("random_resize", victim, smallest=0.9).settings["smallest"] == 0.9
    assert options_of(table["random_resize"]) == {"smallest": 0.85, "seed": 0}
    with pytest.raises(TypeError, match=r"takes no option 'smalest' \(did you mean 'smallest'\?\)"):
        build_defense("random_resize", victim, smalest=0.9)


@pytest.mark.usefixtures("installed")
def test_the_programs_know_it(tmp_path):
    compose = pytest.importorskip("hydra", reason="configs belong to the extra app").compose
    from hydra import initialize_config_module

    from dipguard.config import from_hydra, register

    register()
    with initialize_config_module("conf", version_base="1.3"):
        single = compose("train", overrides=["defense=random_resize", "defense.smallest=0.9"])
        given = "+defenses.resized={_target_: own_defense.RandomResize, smallest: 0.8}"
        many = compose("evaluate", overrides=["+defense@defenses.own=random_resize", given])
    assert from_hydra(single).defenses == {"random_resize": {"name": "random_resize", "smallest": 0.9}}
    defenses = from_hydra(many).defenses
    assert defenses["own"] == {"name": "random_resize", "smallest": 0.85}
    assert defenses["resized"] == {"_target_": "own_defense.RandomResize", "smallest": 0.8}
