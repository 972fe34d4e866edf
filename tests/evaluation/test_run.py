"""One attack and one defence, as train.py runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import Logger

from dipguard.defenses import build_defense
from dipguard.evaluation import prepare, run, runner
from tests import tiny_run
from tests.tiny_run import typed_config

TINY = (*tiny_run.TINY, "defense.network=small")


def test_the_result_is_what_the_defence_gives_by_itself(tmp_path: Path) -> None:
    short = ("data.limit=2", "defense.T=20", "defense.decisions=10", "chunk=1")
    config = typed_config(*TINY, "defense.dtype=float64", *short)
    matrix = prepare(config, tmp_path)
    assert run(matrix) == []
    (result,) = matrix.results["pgd", "paper"]
    options = {name: value for name, value in config.defenses["paper"].items() if name != "name"}
    alone = build_defense("paper", matrix.victim, seed=config.seed, **{**options, "stack_size": 32}, progress=False)
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


class Log(Logger):
    """Keeps the steps that are logged."""

    def __init__(self, steps: list[int], first: int = 0) -> None:
        self.steps, self.first = steps, first

    name = "log"
    version = 0

    def starting_at(self, first_step: int) -> Log:
        return Log(self.steps, first_step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "fit/quality" in metrics:
            self.steps.append(self.first + step)


def test_the_fits_of_one_cell_are_logged_one_after_the_other(tmp_path: Path) -> None:
    steps: list[int] = []
    short = ("defense.stack_size=1", "defense.T=10", "defense.every=5", "defense.decisions=5")
    run(prepare(typed_config(*TINY, *short), tmp_path), log=Log(steps).starting_at)
    assert steps == list(range(4, 40, 5))  # two chunks of two stacks of 10 steps


def test_the_bar_reaches_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(runner.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False})
            bars.append(self)

    monkeypatch.setattr(runner, "tqdm", Bar)
    run(prepare(typed_config(*TINY, "data.limit=3", "defense.T=20", "defense.decisions=10"), tmp_path))
    (bar,) = bars
    assert bar.n == bar.total == 3 * (2 * runner.IMAGE + 20)
