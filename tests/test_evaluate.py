"""evaluate.py from end to end, as on the command line: real digits, attacks and defences, adaptive attacks too."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dipguard.cli import locked
from tests.csv_files import read_csv
from tests.tiny_matrix import TINY, tiny_evaluation, tiny_matrix
from tests.tiny_run import ROOT

FILES = {"results.csv", "images.csv", "config.yaml", "report.md"} | {
    f"table{n}.{kind}" for n in (1, 2) for kind in ("md", "tex")
}
ADAPTIVE = (
    "+attack@attacks.bpda_4=bpda", "attacks.bpda_4={eps_255:4,steps:3,budgets:[1,3]}",
    "+attack@attacks.bpda_8=bpda", "attacks.bpda_8={eps_255:8,steps:3,budgets:[1,3]}",
    "+attack@attacks.hopskipjump=hopskipjump",
    "attacks.hopskipjump={queries:120,budgets:[40,120],radii_255:[0,8,25],init_size:20,init_eval:10}",
    "+attacks.hopskipjump.limit=2",
    "~defenses.median", "~defenses.dip_fixed", "~defenses.mirror", "~attacks.fgsm_8", "~attacks.pgd_8",
)  # fmt: skip
FEWER = ("~attacks.fgsm_8", "~defenses.median", "~defenses.dip_fixed", "~defenses.mirror", "data.limit=3", "figures=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_evaluation(folder, *FEWER)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "results.csv")


def entries(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "store" / "cells").rglob("*.npz")}


def test_the_run_folder_holds_what_is_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert names >= FILES
    assert {f"figure9_{attack}.png" for attack in ("clean", "pgd_8")} <= names
    assert len(rows(finished)) == 2 * 3
    text = (finished / "report.md").read_text()
    assert "PGD 8" in text
    assert "figure9_pgd_8.png" in text


def test_tables_are_made_again_from_what_is_stored_alone(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in FILES - {"config.yaml"}}
    stored = entries(finished)
    for name in before:
        (finished / name).unlink()
    tiny_evaluation(finished, *FEWER, "rebuild=true")
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert entries(finished) == stored


@pytest.mark.slow
def test_adaptive_curves(tmp_path: Path) -> None:
    cells = [cell for cell in tiny_matrix(tmp_path, *ADAPTIVE).cells if cell.adaptive]
    costs = {cell.place: cell.cost for cell in cells}
    assert set(costs) == {
        (attack, defense)
        for attack in ("bpda_4", "bpda_8", "hopskipjump")
        for defense in ("none", "jpeg", "paper")
    }  # fmt: skip
    assert costs["bpda_4", "paper"].dip_steps == 3 * 5 * 20  # three steps, five images, T
    assert costs["hopskipjump", "none"].victim_queries == 2 * 120
    tiny_evaluation(tmp_path, *ADAPTIVE)
    made = [row for row in rows(tmp_path) if row["attack"] != "clean"]
    assert len(made) == 3 * (2 * 2 + 2 * 3)
    last = {(row["attack"], row["defense"]): row for row in made}
    for point in made:
        assert int(point["correct"]) <= int(point["n"]) == (2 if point["attack"] == "hopskipjump" else 5)
        if point is not last[point["attack"], point["defense"]]:
            assert not point["purifications"], "one run of the largest budget served all"
    for place, point in last.items():
        assert 0 < int(point["purifications"]) <= costs[place].purifications
        assert int(point["dip_steps"]) == int(point["purifications"]) * (20 if point["defense"] == "paper" else 0)
    walks = [row for row in made if row["attack"] == "hopskipjump" and row["defense"] == "none"]
    for budget in (40, 120):
        by_eps = [int(row["correct"]) for row in walks if float(row["budget"]) == budget]
        assert len(by_eps) == 3
        assert by_eps == sorted(by_eps, reverse=True)
    assert {"figure4_bpda.png", "figure5_hopskipjump.png"} <= {path.name for path in tmp_path.iterdir()}
    before = entries(tmp_path)
    tiny_evaluation(tmp_path, *ADAPTIVE)
    assert entries(tmp_path) == before


@pytest.mark.slow
def test_a_terminated_sweep_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluate.py"), "-m", f"hydra.sweep.dir={tmp_path}", *TINY]
    command += ["defenses.paper.T=20000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*/results.csv")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 143, said
    assert "evaluate: terminated by SIGTERM; finished work is kept" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*/DONE"))


@pytest.mark.slow
def test_a_folder_that_another_process_works_in_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluate.py"), f"hydra.run.dir={tmp_path}", *TINY]
    with locked(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "another process works in" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_the_processes_of_a_killed_run_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluate.py"), f"hydra.run.dir={tmp_path}", *TINY]
    run = subprocess.Popen([*command, "processes=2", "defenses.paper.T=20000", "defenses.dip_fixed.T=20000"])
    kept: list[str] = []
    for _ in range(1200):  # both workers, and the tracker of their resources
        kept = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        if len(kept) >= 3 or run.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(10)
    run.kill()
    run.wait()
    assert len(kept) >= 3
    for _ in range(600):
        kept = [pid for pid in kept if alive(pid)]
        if not kept:
            break
        time.sleep(0.1)
    assert not kept


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
