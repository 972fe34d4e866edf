"""The masking checks: on a system that really hides its gradient, on one that does not, and on each rule's own case."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dipguard.evaluation import masking
from dipguard.evaluation.cell import CellResult
from dipguard.evaluation.masking import NOT_CHECKED, OK, SAME, WARNING, Randomness, black_box, dynamic, randomised
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import suite_results
from dipguard.evaluation.runner import run
from dipguard.victims import build_victim
from tests.tiny_suite import tiny_suite

ATTACKS = ("transfer", "identity", "hopskipjump", "noise", "large_eps")
STRONG = (
    "data.limit=6", "eps_255=80", "attacks.identity.steps=6", "attacks.identity.alpha_255=12",
    "attacks.large_eps.eps_255=128", "attacks.large_eps.alpha_255=32", "attacks.hopskipjump.queries=1000",
    "attacks.hopskipjump.init_size=20", "attacks.hopskipjump.init_eval=20", "~defenses.jpeg",
)  # fmt: skip


class Rounded(nn.Module):
    """The classifier behind a reduction to 3 bits whose own derivative, zero almost everywhere, is what one gets."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, images: Tensor) -> Tensor:
        return self.victim((images * 7).round() / 7)


def rounded() -> nn.Module:
    return Rounded(build_victim("digits_cnn", progress=False)).eval()


def checked(matrix: Matrix, defense: str = "none") -> dict[str, str]:
    assert run(matrix) == []
    target = matrix.targets[defense]
    randomness = masking.randomness_of(matrix, target)
    return {check.check: check.verdict for check in masking.masking_checks(suite_results(matrix, target), randomness)}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    few = "attacks.hopskipjump.queries=200"
    matrix = tiny_suite(tmp_path_factory.mktemp("honest"), *STRONG, few, attacks=ATTACKS, dip=False)
    run(matrix)
    return matrix


@pytest.mark.slow
def test_a_system_that_hides_nothing_passes_all(honest: Matrix) -> None:
    assert set(checked(honest).values()) == {OK}


@pytest.mark.slow
def test_a_system_that_rounds_its_gradient_away_is_found_out(tmp_path: Path) -> None:
    matrix = tiny_suite(tmp_path, *STRONG, attacks=ATTACKS, dip=False)
    config = replace(matrix.config, victim={"_target_": "tests.evaluation.test_masking.rounded"})
    verdicts = checked(prepare(config, tmp_path))
    warned = {name for name, verdict in verdicts.items() if verdict == WARNING}
    assert warned >= {"no gradient vanishes", "a large eps reaches 0 %", "black box does not beat white box"}
    # The same rounding, as a defence with the identity in place of its derivative, hides nothing.
    overrides = ("+defense@defenses.bit_depth=bit_depth", "~defenses.none")
    defended = tiny_suite(tmp_path / "defended", *STRONG, *overrides, attacks=ATTACKS, dip=False)
    assert checked(defended, "bit_depth")["no gradient vanishes"] == OK
    assert checked(defended, "bit_depth")["a large eps reaches 0 %"] == OK


def result(matrix: Matrix, attack: str, right: list[int] | None = None, **values: object) -> CellResult:
    """The real result of an attack, with other outcomes."""
    (mine,) = matrix.results[attack, "none"]
    labels = matrix.clean.labels
    decisions = mine.decisions if right is None else torch.where(torch.tensor(right) > 0, labels, (labels + 1) % 10)
    return replace(mine, decisions=decisions, **values)


@pytest.mark.parametrize(
    ("history", "last", "verdict"),
    [
        ([1.0, 0.5, 0.5], [1.0, 0.5, 0.5], OK),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.67], OK),  # what six images cannot tell
        ([0.0] * 60, [0.5, *[0.0] * 58, 0.5], OK),  # the best of sixty looks is a lucky one
        ([0.5, 0.67], [0.5, 0.67], WARNING),
        ([0.0, 0.0], [0.0, 1.0], WARNING),
        ([], [], NOT_CHECKED),
    ],
)
def test_more_steps(honest: Matrix, history: list[float], last: list[float], verdict: str) -> None:
    assert masking.more_steps([result(honest, "identity", history=history, last_history=last)]).verdict == verdict


@pytest.mark.parametrize(("right", "verdict"), [([0] * 6, OK), ([0] * 5 + [1], WARNING), (None, NOT_CHECKED)])
def test_large_eps(honest: Matrix, right: list[int] | None, verdict: str) -> None:
    results = [result(honest, "identity")] if right is None else [result(honest, "large_eps", right)]
    assert masking.large_eps(results).verdict == verdict
    assert masking.large_eps([replace(one, eps_255=None) for one in results]).verdict == verdict  # as of DDN


@pytest.mark.parametrize(
    ("white", "black", "verdict", "alone"),
    [
        ([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], OK, 0),
        ([0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], OK, 2),
        ([0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], WARNING, 2),
    ],
)
def test_black_box(honest: Matrix, white: list[int], black: list[int], verdict: str, alone: int) -> None:
    check = black_box([result(honest, "identity", white), result(honest, "hopskipjump", black)])
    assert check.verdict == verdict
    assert f"{alone} broken by black box alone" in check.figures
    assert black_box([result(honest, "identity", white)]).verdict == NOT_CHECKED


def test_an_attack_on_fewer_images_narrows_no_comparison(honest: Matrix) -> None:
    def first(result: CellResult, n: int) -> CellResult:
        return replace(result, decisions=result.decisions[:n])

    white, black = result(honest, "identity", [0, 0, 1, 1, 1, 1]), result(honest, "hopskipjump", [1, 1, 0, 0, 0, 0])
    short = first(result(honest, "transfer", [0, 0, 1, 1, 1, 1]), 2)
    assert black_box([white, short, black]).verdict == WARNING
    assert black_box([first(white, 2), black]).verdict == OK
    noise = result(honest, "noise", [1, 1, 0, 0, 0, 0])
    assert masking.control([noise, white, short]).verdict == WARNING


def test_black_box_counts_the_draw_that_an_attack_with_fixed_draws_knows(honest: Matrix) -> None:
    labels = honest.clean.labels
    white = result(honest, "identity", [0] * 6, draws=labels.expand(3, -1))
    black = result(honest, "hopskipjump", [1, 0, 0, 0, 0, 0], draws=((labels + 1) % 10).expand(3, -1))
    assert white.right.sum() > black.right.sum()
    figures = black_box([white, black]).figures
    assert figures.startswith("black box at best 1 of 6 right (hopskipjump), white box 0 ")
    assert figures.endswith("; 0 broken by black box alone")
    assert black_box([white, black]).verdict == OK
    attack = copy.copy(white.cell.attack)
    attack.final_looks = 3  # it looked at other draws too, before it chose
    looked = replace(white, cell=replace(white.cell, attack=attack))
    assert "white box 4.5 " in black_box([looked, black]).figures


@pytest.mark.parametrize(
    ("noise", "attack", "verdict"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], OK),
        ([1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], WARNING),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], OK),
    ],
)
def test_control(honest: Matrix, noise: list[int], attack: list[int], verdict: str) -> None:
    assert masking.control([result(honest, "noise", noise), result(honest, "identity", attack)]).verdict == verdict
    assert masking.control([result(honest, "noise", noise)]).verdict == NOT_CHECKED


@pytest.mark.parametrize(("flat", "verdict"), [(0.0, OK), (0.1, WARNING), (None, NOT_CHECKED)])
def test_gradients(honest: Matrix, flat: float | None, verdict: str) -> None:
    assert masking.gradients([result(honest, "identity", flat=flat)]).verdict == verdict


def with_options(result: CellResult, **options: object) -> CellResult:
    return replace(result, cell=replace(result.cell, options=options))


def test_flags_ask_for_attacks_that_know_of_them(honest: Matrix) -> None:
    still, moving = Randomness(0.0, 0), Randomness(2.0, 40)
    transfer, adaptive = result(honest, "transfer"), result(honest, "identity")
    eot = with_options(adaptive, eot_iter=4, draws="fresh")
    assert [randomised([adaptive], p).verdict for p in (still, moving, None)] == [OK, WARNING, NOT_CHECKED]
    assert randomised([eot], moving).verdict == OK
    assert [dynamic([transfer], p).verdict for p in (still, moving, None)] == [OK, WARNING, NOT_CHECKED]
    assert dynamic([adaptive], moving).verdict == OK
    for options in ({"eot_iter": 4, "draws": "fixed"}, {"eot_iter": 1, "draws": "fresh"}):
        assert randomised([with_options(adaptive, **options)], moving).verdict == WARNING
    for name in ("hopskipjump", "large_eps"):  # a search by questions alone, and a check
        other = result(honest, name)
        assert dynamic([other], moving).verdict == WARNING
        assert randomised([with_options(other, eot_iter=4, draws="fresh")], moving).verdict == WARNING


@pytest.mark.slow
def test_flags_are_found_not_assumed(tmp_path: Path) -> None:
    matrix = tiny_suite(tmp_path, attacks=("noise",))
    one = matrix.clean.select(limit=1)
    found = {label: masking.check_randomness(t, one, matrix.device) for label, t in matrix.targets.items()}
    assert {label: (p.drawn > SAME, p.backward > 0) for label, p in found.items()} == {
        "none": (False, False),
        "jpeg": (False, False),
        "mirror": (True, True),
        "paper": (True, True),
        "dipdefend": (True, True),
    }
    more = found["mirror"].backward - matrix.targets["mirror"].defense.steps_per_image
    assert 0 <= more <= 16  # the last step, along the victim's gradient, takes as many at most


def test_backward_passes_are_counted_and_the_profiler_is_put_back() -> None:
    seen: list[str] = []

    def mine(frame: object, event: str, what: object) -> None:
        seen.append(event)

    x = torch.ones(3, requires_grad=True)
    before = sys.getprofile()
    sys.setprofile(mine)
    try:
        with masking.counting_backward() as calls:
            (x**2).sum().backward()
            torch.autograd.grad((x**3).sum(), x)
            (x**2).sum()
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(before)
    assert calls == [2]
    assert seen


def test_randomness_is_looked_for_on_a_noisy_image(tmp_path: Path) -> None:
    class Seen:
        def purify(self, images: Tensor, *, indices: Tensor) -> Tensor:
            self.images = images
            return images

    matrix = tiny_suite(tmp_path, attacks=("transfer",), dip=False)
    seen, one = Seen(), matrix.clean.select(limit=1)
    masking.check_randomness(replace(matrix.targets["none"], bare=seen), one, matrix.device)
    assert float((seen.images - one.images).abs().max()) == pytest.approx(8 / 255, abs=1e-3)
