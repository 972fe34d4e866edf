"""One attack and one defence, as train.py runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dipguard.defenses import build_defense
from dipguard.evaluation import runner
from dipguard.evaluation.cell import Cell
from dipguard.evaluation.matrix import Row
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import write_results
from dipguard.evaluation.runner import run
from tests import tiny_run
from tests.csv_files import read_csv
from tests.tiny_matrix import completed, typed_matrix
from tests.tiny_run import typed_config

TINY = (*tiny_run.TINY, "defense.network=small")


def test_the_result_is_what_the_defence_gives_by_itself(tmp_path: Path) -> None:
    short = ("data.limit=2", "defense.T=20", "defense.decisions=10", "chunk=1")
    config = typed_config(*TINY, "defense.dtype=float64", *short)
    matrix = completed(prepare(config, tmp_path))
    (result,) = matrix.results["pgd", "paper"]
    options = {name: value for name, value in config.defenses["paper"].items() if name != "name"}
    victim, options["stack_size"] = matrix.targets["paper"].victim, 32
    alone = build_defense("paper", victim, seed=config.seed, **options, progress=False)
    direct = alone.defend(matrix.attacked("pgd", "paper"), indices=matrix.clean.indices)
    images = matrix.reconstructions("pgd", "paper")
    assert torch.allclose(images.double(), direct.reconstructions.double(), atol=1e-5)
    assert result.decisions.tolist() == direct.decisions_after.tolist()
    assert result.decisions_given.tolist() == direct.decisions_before.tolist()
    assert (result.reasons, result.used.tolist()) == (direct.reasons, direct.used)
    assert set(result.seconds) == {"attack", "start", "fit", "decide"}
    assert min(result.seconds.values()) > 0


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(prepare(typed_config(*TINY, "data.limit=1", "defense.T=10", "defense.decisions=5"), tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


class Log:
    """Keeps the steps of each chunk, and what is finished."""

    def __init__(self) -> None:
        self.steps: dict[int, list[int]] = {}
        self.cells: list[str] = []

    def curves(self, cell: Cell, *, chunk: int) -> Row:
        steps = self.steps.setdefault(chunk, [])
        return lambda step, metrics: steps.append(step)

    def finished(self, cell: Cell) -> None:
        self.cells.append(cell.label)


def test_a_log_is_told_of_fits_and_finished_cells_once_and_again_by_the_next_run(tmp_path: Path) -> None:
    short = ("defense.stack_size=1", "defense.T=10", "defense.every=5", "defense.decisions=5")
    first, second = Log(), Log()
    for log in (first, second):
        matrix = prepare(typed_config(*TINY, *short), tmp_path)
        run(matrix, log=log)
        assert log.cells == ["pgd"]
    stacks = [4, 9, 14, 19]  # two chunks of two stacks of 10 steps
    assert {chunk: steps[:4] for chunk, steps in first.steps.items()} == {0: stacks, 1: stacks}
    assert second.steps == {}
    stored = [[step for step, _ in rows] for rows in matrix.curves(matrix.cells[0])]
    assert stored == [stacks, stacks]


class Broken(Log):
    """Cannot log what is finished."""

    def finished(self, cell: Cell) -> None:
        super().finished(cell)
        raise OSError("no space left on device")


def test_a_copy_that_cannot_be_written_loses_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(matrix: Any, *, images: bool = True) -> None:
        if not images:  # the table that is brought up to date after each cell
            raise PermissionError("results.csv is open elsewhere")
        write_results(matrix)

    matrix = prepare(typed_matrix("data.limit=1", "defense=jpeg", "~attacks.pgd_8"), tmp_path)
    monkeypatch.setattr(runner, "write_results", refused)
    log = Broken()
    assert run(matrix, log=log) == []
    assert log.cells == [cell.label for cell in matrix.cells]
    assert {row["status"] for row in read_csv(tmp_path / "results.csv")} == {"done"}


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars of the runs of a test; each has the list ``updates``."""
    made: list[Any] = []

    class Bar(runner.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False})
            self.updates: list[float] = []
            made.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            self.updates.append(n or 0)
            return super().update(n)

    monkeypatch.setattr(runner, "tqdm", Bar)
    return made


def test_the_bar_reaches_its_end(tmp_path: Path, bars: list[Any]) -> None:
    matrix = prepare(typed_config(*TINY, "data.limit=3", "defense.T=20", "defense.decisions=10", "chunk=2"), tmp_path)
    cell = matrix.cells[0]
    matrix.chunk(cell, 0, slice(0, 2))  # of a run that was stopped: not counted again, so that the time left is right
    run(matrix)
    (bar,) = bars
    assert bar.n == bar.total == 3 * 2 * runner.IMAGE + 20


def test_the_bar_moves_with_each_look_of_an_adaptive_attack(tmp_path: Path, bars: list[Any]) -> None:
    overrides = ("attack=bpda", "attack.budgets=[3]", "attack.steps=3", "defense.T=20", "data.limit=3")
    run(prepare(typed_config(*TINY, "defense.decisions=10", *overrides), tmp_path))
    (bar,) = bars
    looks = bar.updates
    assert looks[:3] == [3 * (runner.IMAGE + 20)] * 3
    assert bar.n == bar.total == sum(looks)
