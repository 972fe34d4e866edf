"""evaluate.py from end to end, as on the command line: real digits, attacks, rows and defence-aware attacks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from dipguard.evaluation.aware import estimate_aware
from tests.tiny_matrix import TINY, compose_matrix, tiny_evaluation, tiny_matrix
from tests.tiny_run import CONF, ROOT

FILES = {"results.csv", "images.csv", "config.yaml", "report.md"} | {
    f"table{n}.{kind}" for n in (1, 2) for kind in ("md", "csv", "tex")
}
AWARE = (
    "+aware@aware.bpda=bpda",
    "aware.bpda.eps_255=[4,8]",
    "aware.bpda.budgets=[1,3]",
    "+aware@aware.hopskipjump=hopskipjump",
    "aware.hopskipjump.eps_255=[0,8,25]",
    "aware.hopskipjump.budgets=[40,120]",
    "aware.hopskipjump.limit=2",
    "~rows.median",
    "~rows.dip_fixed",
    "~rows.dipguard",
    "~columns.fgsm_8",
    "~columns.pgd_8",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_evaluation(folder)
    return folder


def points(folder: Path) -> list[dict[str, str]]:
    with (folder / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_run_folder_holds_what_is_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert FILES <= names
    assert {f"figure9_{column}.png" for column in ("clean", "fgsm_8", "pgd_8")} <= names
    text = (finished / "report.md").read_text()
    assert "PGD 8" in text
    assert "figure9_pgd_8.png" in text


def test_tables_are_made_again_from_what_is_stored_alone(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in FILES - {"config.yaml"}}
    stored = {path: path.stat().st_mtime_ns for path in (finished / "cells").rglob("*.npz")}
    for name in before:
        (finished / name).unlink()
    tiny_evaluation(finished, "rebuild=true")
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in (finished / "cells").rglob("*.npz")} == stored


def test_a_rebuild_of_nothing_says_so(tmp_path: Path) -> None:
    tiny_evaluation(tmp_path, "rebuild=true")
    assert "No cell is finished yet" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_defence_aware_curves(tmp_path: Path) -> None:
    costs = estimate_aware(tiny_matrix(tmp_path, *AWARE))
    assert set(costs) == {f"{a} x {r}" for a in ("bpda", "hopskipjump") for r in ("none", "jpeg", "paper")}
    assert costs["bpda x paper"].dip_steps == 2 * 3 * 5 * 20  # two eps, three steps, five images, T
    assert costs["hopskipjump x none"].victim_queries == 2 * 120
    tiny_evaluation(tmp_path, *AWARE)
    made = points(tmp_path)
    assert len(made) == 3 * (2 * 2 + 2 * 3)
    for point in made:
        cost = costs[f"{point['attack']} x {point['row']}"]
        assert 0 < int(point["purifications"]) <= cost.purifications
        assert int(point["dip_steps"]) == int(point["purifications"]) * (20 if point["row"] == "paper" else 0)
        assert int(point["correct"]) <= int(point["n"]) == (2 if point["attack"] == "hopskipjump" else 5)
    walks = [p for p in made if p["attack"] == "hopskipjump" and p["row"] == "none"]
    for budget in ("40", "120"):
        by_eps = [int(p["correct"]) for p in walks if p["budget"] == budget]
        assert by_eps == sorted(by_eps, reverse=True)
    assert {"figure4_bpda.png", "figure5_hopskipjump.png"} <= {path.name for path in tmp_path.iterdir()}
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "curves").rglob("*.json")}
    tiny_evaluation(tmp_path, *AWARE)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "curves").rglob("*.json")} == cells


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rows.jpeg.options.quality=0"], "rows.jpeg.options.quality"),
        (["+aware@aware.a=bpda", "+aware@aware.b=bpda"], "`aware` must name each attack once"),
        (["+aware@aware.bpda=bpda", "aware.bpda.budgets=[0]"], "`aware.bpda.budgets` must be at least 1"),
        (["+aware@aware.bpda=bpda", "aware.bpda.attack=pgd"], "`aware.bpda.attack` must be one of"),
        (["data=arrays"], "data.path"),
    ],
)
def test_bad_settings_end_before_anything_runs(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(CompactHydraException, match=message):
        tiny_evaluation(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiments_compose(name: str) -> None:
    given = ["data.labels_csv=labels.csv"] if "imagenet" in name else []
    config = compose_matrix(f"experiment={name}", *given)
    if name.startswith("table1"):
        assert len(config.columns) == 15
        assert {key: value.eps_255 for key, value in config.columns.items() if value.eps_255} == {
            f"{attack}_{eps}": eps for attack in ("fgsm", "pgd", "bim", "mifgsm") for eps in (2, 4, 8)
        }
        assert len(config.rows) >= 13
    elif name == "adaptive":
        assert (list(config.columns), set(config.rows)) == (["clean"], {"none", "jpeg", "dipdefend", "dipguard"})
        assert len(config.ladder) == 17
    else:
        assert len(config.aware) == 1


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluate.py"), f"hydra.run.dir={tmp_path}", *TINY, "~columns.fgsm_8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (done := sorted((tmp_path / "cells").rglob("*.npz"))) and first.poll() is None:
        pass
    first.kill()
    first.wait()
    times = {path: path.stat().st_mtime_ns for path in done if path.is_file()}
    assert times
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "cells").glob("*/*.npz"))) == 12  # six rows, two columns
    kept = [path for path in times if path.is_file()]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
