"""Attacked images judged by several draws of a random defence."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dipguard.attacks.target import JUDGE, fresh_indices
from dipguard.defenses import Defense
from dipguard.evaluation.cell import JUDGED, CellResult
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide, wilson
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import suite_results, worst_case, write_results
from dipguard.evaluation.runner import _share_out, run
from dipguard.seeding import image_generator
from tests.csv_files import read_csv
from tests.store.parts import list_entries
from tests.tiny_matrix import completed, written
from tests.tiny_suite import tiny_suite

ATTACKS = ("transfer", "noise", "identity")
FEW = ("data.limit=3", "chunk=2", "~defenses.jpeg", f"+defenses.noisy._target_={__name__}.Noisy")


class Noisy(Defense):
    """Strong noise, drawn from seed and index; it says that it takes seven DIP steps an image, to be counted."""

    name = "noisy"
    random = True
    steps_per_image = 7

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        draws = image_generator(seed=self.seed, index=index, purpose="noisy")
        return (image + 0.5 * torch.randn(image.shape, generator=draws)).clamp(0, 1)


def suite(folder: Path, judge: int) -> Matrix:
    return tiny_suite(folder, *FEW, f"judge={judge}", attacks=ATTACKS, dip=False)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return completed(suite(tmp_path_factory.mktemp("judged"), 4))


def lines(matrix: Matrix) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["attack"], line["defense"]): line for line in read_csv(matrix.folder / "results.csv")}


def fits_of(matrix: Matrix) -> set[str]:
    """What the stored purifications of noisy are."""
    return {i.header["what"] for i in list_entries(matrix.store.path) if "x noisy, images" in i.header["what"]}


@pytest.mark.slow
def test_processes_share_the_further_draws_too(tmp_path: Path, judged: Matrix) -> None:
    matrix = tiny_suite(tmp_path, *FEW, "judge=4", "processes=2", attacks=ATTACKS, dip=False)
    write_results(matrix)
    _share_out(matrix, matrix.cells)
    assert {what for what in fits_of(judged) if not what.startswith("identity")} == fits_of(matrix)
    completed(matrix)
    assert torch.equal(*(torch.stack([m.results[a, "noisy"][0].right for a in ATTACKS]) for m in (judged, matrix)))


@pytest.mark.parametrize(
    ("draws", "accuracy", "worst", "vote", "known"),
    [  # the label is 1
        ([1], 1, 1, 1, 1),
        ([2], 0, 0, 0, 0),
        ([1, 1, 1, 1], 1, 1, 1, 1),
        ([1, 1, 2, 1], 0.75, 0, 1, 1),
        ([1, 2, 1, 2], 0.5, 0, 0, 1),
        ([3, 2, 1, 1], 0.5, 0, 1, 0),
        ([2, 3, 2, 1], 0.25, 0, 0, 0),
    ],
)
def test_four_figures_of_an_image(draws: list[int], accuracy: float, worst: float, vote: float, known: float) -> None:
    cell: Any = SimpleNamespace(clean=SimpleNamespace(labels=torch.tensor([1, 0])))
    first, *others = (torch.tensor([draw, 0]) for draw in draws)
    result = CellResult(cell, "done", decisions=first, draws=torch.stack(others) if others else torch.zeros(0))
    assert [result.judged(by).tolist() for by in JUDGED] == [
        [accuracy, 1], [worst, 1], [vote, 1], [known, 1],
    ]  # fmt: skip


def test_each_draw_is_a_purification_of_its_own(judged: Matrix) -> None:
    clean, target, drawn = judged.clean, judged.targets["noisy"], []
    for attack in ("clean", "transfer", "identity"):
        attacked = judged.attacked(attack, "noisy")
        (result,) = judged.results[attack, "noisy"]
        assert result.draws.shape == (3, 3)
        for number in (1, 2, 3):
            indices = fresh_indices(clean.indices, JUDGE + number)
            drawn.append(decide(target.victim, target.bare.purify(attacked, indices=indices)))
            assert torch.equal(result.draws[number - 1], drawn[-1])
        assert torch.equal(result.decisions, decide(target.victim, judged.reconstructions(attack, "noisy")))
    assert len({tuple(one.tolist()) for one in drawn}) > 3  # the draws do differ


def test_the_draws_are_those_of_no_attack_and_of_no_other_image() -> None:
    indices = torch.arange(50)
    asked = torch.cat([fresh_indices(indices, look) for look in (*range(200), *range(JUDGE + 1, JUDGE + 11))])
    assert len(asked.unique()) == len((asked % 2**32).unique()) == len(asked)
    assert bool((asked >= 2**32).all())


def test_the_table_has_four_figures_and_what_they_cost(judged: Matrix) -> None:
    made, steps = lines(judged), judged.targets["noisy"].defense.steps_per_image
    for attack in ("clean", "transfer", "noise", "identity", "worst_case"):
        for defense in ("none", "noisy"):
            draws = 4 if defense == "noisy" and attack != "noise" else 1  # a check is judged once
            line = made[attack, defense]
            assert int(line["judge"]) == draws
            assert float(line["accuracy"]) == pytest.approx(float(line["correct"]) / 3, abs=1e-6)
            assert float(line["worst"]) <= float(line["accuracy"])
            for by in ("worst", "vote", "known"):
                ends = wilson(round(3 * float(line[by])), 3)
                assert [float(line[f"{by}_{end}"]) for end in ("low", "high")] == pytest.approx(ends, abs=1e-6)
            if attack != "worst_case":
                assert (int(line["judge_queries"]), int(line["judge_dip_steps"])) == (
                    3 * draws, 3 * draws * steps * (defense == "noisy"),
                )  # fmt: skip
                (result,) = judged.results[attack, defense]
                spent = sum(seconds for part, seconds in result.seconds.items() if part != "attack")
                assert float(line["judge_seconds"]) == pytest.approx(spent, abs=1e-5)
                assert ("judge" in result.seconds) == (draws > 1)
    worst = [torch.stack([judged.results[a, "noisy"][0].judged(by) for a in ("clean", "transfer", "identity")])
             for by in JUDGED]  # fmt: skip
    line = made["worst_case", "noisy"]
    assert [float(line[by]) for by in JUDGED] == pytest.approx(
        [float(one.amin(dim=0).mean()) for one in worst], abs=1e-6
    )


def test_the_worst_case_is_taken_for_each_image_by_each_figure(judged: Matrix) -> None:
    found = suite_results(judged, judged.targets["noisy"])
    right, wrong = judged.clean.labels, (judged.clean.labels + 1) % 10
    some = [replace(r, decisions=right, draws=torch.stack([right, wrong, wrong])) for r in found if r.attacks]
    clean = replace(judged.results["clean", "noisy"][0], decisions=right, draws=torch.stack([right] * 3))
    figures = {by: worst_case(some[:1], clean, by=by) for by in JUDGED}
    assert {by: one.tolist() for by, one in figures.items() if one is not None} == {
        "accuracy": [0.5] * 3, "worst": [0] * 3, "vote": [0] * 3, "known": [1] * 3,
    }  # fmt: skip


def test_a_run_that_is_stopped_while_it_judges_goes_on(
    judged: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, made, count = suite(tmp_path, 4), Matrix.draw, 0

    def stopped(self: Matrix, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return made(self, *args, **options)

    monkeypatch.setattr(Matrix, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(matrix)
    before = written(matrix)
    assert sum("draw" in info.header["what"] for info in list_entries(matrix.store.path)) == 4
    monkeypatch.setattr(Matrix, "draw", made)
    assert run(suite(tmp_path, 4)) == []
    assert before.items() <= written(matrix).items()
    kept = (*JUDGED, "low", "key")
    mine, whole = ({k: [line[name] for name in kept] for k, line in lines(m).items()} for m in (matrix, judged))
    assert mine == whole
    assert fits_of(matrix) == fits_of(judged)


def test_one_draw_is_as_it_was_and_more_come_on_top(judged: Matrix, tmp_path: Path) -> None:
    single = completed(suite(tmp_path, 1))
    before = written(single)
    assert not any("judge" in name for line in lines(single).values() for name in line)
    assert not any("draw" in what for what in fits_of(single))
    assert [cell.key for cell in single.cells] == [cell.key for cell in judged.cells]
    again = completed(suite(tmp_path, 4))
    now = written(single)
    assert before.items() <= now.items()
    own, theirs = ({place: line["accuracy"] for place, line in lines(m).items()} for m in (again, judged))
    assert own == theirs
    assert run(prepare(replace(again.config, judge=1), tmp_path)) == []
    assert set(written(single)) == set(now)
