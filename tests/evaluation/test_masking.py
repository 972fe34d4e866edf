"""The masking checks: on a system that really hides its gradient, on one that does not, and on each rule's own case."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dipguard.evaluation.ladder import run_ladder
from dipguard.evaluation.ladder_plan import plan_ladder, targets_of
from dipguard.evaluation.ladder_results import Cell, load_cells, load_clean
from dipguard.evaluation.masking import (
    NOT_CHECKED,
    OK,
    WARNING,
    black_box,
    check_target,
    control,
    dynamic,
    gradients,
    large_eps,
    more_steps,
    randomised,
)
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.probes import Probe, counting_backward, probe
from tests.tiny_ladder import tiny_ladder

RUNGS = ("transfer", "identity", "hopskipjump", "noise", "large_eps")
STRONG = (
    "data.limit=6",
    "ladder_eps_255=48",
    "ladder.identity.options.steps=6",
    "ladder.identity.options.alpha_255=12",
    "ladder.large_eps.eps_255=128",
    "ladder.large_eps.options.alpha_255=32",
    "ladder.hopskipjump.options.queries=1000",
    "ladder.hopskipjump.options.init_size=20",
    "ladder.hopskipjump.options.init_eval=20",
    "~rows.jpeg",
)


class Rounded(nn.Module):
    """The classifier behind a reduction to 3 bits whose own derivative, zero almost everywhere, is what one gets."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, images: Tensor) -> Tensor:
        return self.victim((images * 7).round() / 7)


def checked(matrix: Matrix, row: str = "none") -> dict[str, str]:
    assert run_ladder(matrix) == []
    (target,) = [target for target in targets_of(matrix) if target.label == row]
    mine = [cell for cell in load_cells(matrix, plan_ladder(matrix)) if cell.planned.target.label == row]
    clean = load_clean(matrix, target)
    assert clean is not None
    return {check.check: check.verdict for check in check_target(mine, Probe.of(clean))}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    matrix = tiny_ladder(tmp_path_factory.mktemp("honest"), *STRONG, rungs=RUNGS, dip=False)
    run_ladder(matrix)
    return matrix


def test_a_system_that_hides_nothing_passes_all(honest: Matrix) -> None:
    assert set(checked(honest).values()) == {OK}


@pytest.mark.slow
def test_a_system_that_rounds_its_gradient_away_is_found_out(tmp_path: Path, honest: Matrix) -> None:
    matrix = tiny_ladder(tmp_path, *STRONG, rungs=RUNGS, dip=False)
    verdicts = checked(replace(matrix, victim=Rounded(matrix.victim)))
    warned = {name for name, verdict in verdicts.items() if verdict == WARNING}
    assert warned >= {"no gradient vanishes", "a large eps reaches 0 %", "black box does not beat white box"}
    # The same rounding, as a defence with the identity in place of its derivative, hides nothing.
    overrides = ("+rival@rows.bit_depth=bit_depth", "~rows.none")
    defended = tiny_ladder(tmp_path / "defended", *STRONG, *overrides, rungs=RUNGS, dip=False)
    assert checked(defended, "bit_depth")["no gradient vanishes"] == OK
    assert checked(defended, "bit_depth")["a large eps reaches 0 %"] == OK


def cell(matrix: Matrix, rung: str, right: list[int] | None = None, **values: object) -> Cell:
    """A real cell of a rung, with other outcomes."""
    (mine,) = [
        c for c in load_cells(matrix, plan_ladder(matrix)) if (c.planned.rung, c.planned.target.label) == (rung, "none")
    ]
    outcome = mine.right if right is None else np.array(right, dtype=bool)
    return replace(mine, right=outcome, **values)


STEPS = [
    ([1.0, 0.5, 0.5], [1.0, 0.5, 0.5], OK),
    ([0.5, 0.5, 0.5], [0.5, 0.5, 0.67], OK),  # what six images cannot tell
    ([0.5, 0.67], [0.5, 0.67], WARNING),
    ([0.0, 0.0], [0.0, 1.0], WARNING),
    ([], [], NOT_CHECKED),
]


@pytest.mark.parametrize(("history", "last", "verdict"), STEPS)
def test_more_steps(honest: Matrix, history: list[float], last: list[float], verdict: str) -> None:
    assert more_steps([cell(honest, "identity", history=history, last_history=last)]).verdict == verdict


@pytest.mark.parametrize(("right", "verdict"), [([0] * 6, OK), ([0] * 5 + [1], WARNING), (None, NOT_CHECKED)])
def test_large_eps(honest: Matrix, right: list[int] | None, verdict: str) -> None:
    cells = [cell(honest, "identity")] if right is None else [cell(honest, "large_eps", right)]
    assert large_eps(cells).verdict == verdict


@pytest.mark.parametrize(
    ("white", "black", "verdict", "alone"),
    [
        ([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], OK, 0),
        ([0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], OK, 2),
        ([0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], WARNING, 2),
    ],
)
def test_black_box(honest: Matrix, white: list[int], black: list[int], verdict: str, alone: int) -> None:
    check = black_box([cell(honest, "identity", white), cell(honest, "hopskipjump", black)])
    assert check.verdict == verdict
    assert f"{alone} broken by black box alone" in check.figures
    assert black_box([cell(honest, "identity", white)]).verdict == NOT_CHECKED


@pytest.mark.parametrize(
    ("noise", "attack", "verdict"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], OK),
        ([1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], WARNING),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], OK),
    ],
)
def test_control(honest: Matrix, noise: list[int], attack: list[int], verdict: str) -> None:
    assert control([cell(honest, "noise", noise), cell(honest, "identity", attack)]).verdict == verdict
    assert control([cell(honest, "noise", noise)]).verdict == NOT_CHECKED


@pytest.mark.parametrize(("flat", "verdict"), [(0.0, OK), (0.1, WARNING), (None, NOT_CHECKED)])
def test_gradients(honest: Matrix, flat: float | None, verdict: str) -> None:
    assert gradients([cell(honest, "identity", flat=flat)]).verdict == verdict


def test_flags_ask_for_attacks_that_know_of_them(honest: Matrix) -> None:
    still, moving = Probe(0.0, 0.0, 0), Probe(2.0, 0.0, 40)
    transfer, aware = cell(honest, "transfer"), cell(honest, "identity")
    eot = replace(aware, planned=replace(aware.planned, options={"eot_iter": 4, "draws": "fresh"}))
    assert [randomised([aware], p).verdict for p in (still, moving, None)] == [OK, WARNING, NOT_CHECKED]
    assert randomised([eot], moving).verdict == OK
    assert [dynamic([transfer], p).verdict for p in (still, moving, None)] == [OK, WARNING, NOT_CHECKED]
    assert dynamic([aware], moving).verdict == OK


@pytest.mark.slow
def test_flags_are_found_not_assumed(tmp_path: Path) -> None:
    matrix = tiny_ladder(tmp_path, rungs=("noise",))
    found = {t.label: probe(t, matrix.clean.select(limit=1), matrix.device) for t in targets_of(matrix)}
    assert {label: (p.randomised, p.dynamic) for label, p in found.items()} == {
        "none": (False, False),
        "jpeg": (False, False),
        "dipguard": (True, True),
        "dipdefend": (True, True),
    }
    assert found["dipguard"].backward == matrix.rows["dipguard"].steps_per_image
    assert all(p.repeated < 1e-4 for p in found.values())


def test_backward_passes_are_counted_and_the_profiler_is_put_back() -> None:
    seen: list[str] = []

    def mine(frame: object, event: str, what: object) -> None:
        seen.append(event)

    x = torch.ones(3, requires_grad=True)
    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        with counting_backward() as calls:
            (x**2).sum().backward()
            torch.autograd.grad((x**3).sum(), x)
            (x**2).sum()
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)
    assert calls == [2]
    assert seen
