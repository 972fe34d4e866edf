"""Attacks that are made on one defence and judged on all."""

from pathlib import Path

import pytest
import torch

from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import decide
from dipguard.evaluation.results import result_row
from tests.store.parts import list_entries
from tests.tiny_matrix import completed
from tests.tiny_suite import tiny_suite

FROM_JPEG = (
    "+attacks.from_jpeg.name=adaptive_pgd",
    "+attacks.from_jpeg.number=t",
    "+attacks.from_jpeg.eps_255=24",
    "+attacks.from_jpeg.steps=3",
)
MADE_ON = (*FROM_JPEG, "+attacks.from_jpeg.made_on=jpeg", "+defense@defenses.blurred=median")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """The baseline is a classifier of its own: the digits' one on images without their edges."""
    baseline = "+baseline._target_=tests.evaluation.test_made_on.dimmed"
    return completed(tiny_suite(tmp_path_factory.mktemp("made"), *MADE_ON, baseline, attacks=("transfer",), dip=False))


def dimmed() -> torch.nn.Module:
    from dipguard.victims import build_victim

    victim = build_victim("digits_cnn", progress=False)
    return torch.nn.Sequential(torch.nn.Threshold(0.6, 0.0), victim).eval()


def test_images_are_made_once_and_read_by_all(finished: Matrix) -> None:
    made = [i for i in list_entries(finished.store.path) if i.path.parent.parent.name == "attacks"]
    of_it = [info for info in made if info.header["what"].startswith("from_jpeg")]
    assert len(of_it) == 1
    jpeg = finished.attacked("from_jpeg", "jpeg")
    for label, target in finished.targets.items():
        assert torch.equal(finished.attacked("from_jpeg", label), jpeg)
        (result,) = finished.results["from_jpeg", label]
        purified = target.defense.purify(jpeg, indices=finished.clean.indices)
        assert torch.equal(result.decisions, decide(target.victim, purified))
        assert torch.equal(result.decisions_given, decide(target.victim, jpeg))
    given = [finished.results["from_jpeg", label][0].decisions_given for label in ("jpeg", "baseline")]
    assert not torch.equal(*given)


def test_cost_and_course_are_those_of_the_row_where_they_were_made(finished: Matrix) -> None:
    for label in finished.targets:
        (result,) = finished.results["from_jpeg", label]
        cell, row = finished.cell("from_jpeg", label), result_row(finished, result)
        assert (bool(result.history), bool(result.last_history), result.flat is not None) == (label == "jpeg",) * 3
        assert cell.white_box == (label == "jpeg")
        assert (row["purifications"] > 0, row["attack_seconds"] > 0) == (label == "jpeg",) * 2
        assert (cell.cost.purifications > 0) == (label == "jpeg")


def test_made_on_the_row_itself_it_is_the_same_as_without(finished: Matrix, tmp_path: Path) -> None:
    plain = tiny_suite(tmp_path, *FROM_JPEG, attacks=("transfer",), dip=False)
    keys = [matrix.cell("from_jpeg", "jpeg").key for matrix in (plain, finished)]
    assert keys[0] == keys[1]
    assert plain.cell("from_jpeg", "none").attack_key != finished.cell("from_jpeg", "none").attack_key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*FROM_JPEG, "+attacks.from_jpeg.made_on=jpg"), "`attacks.from_jpeg.made_on` must be one of none, jpeg, got"),
        (("+attacks.transfer.made_on=jpeg",), "`attacks.transfer.made_on` is for adaptive attacks, got it for 'pgd'"),
        ((*MADE_ON, "+attacks.from_jpeg.only=[none]"), "`attacks.from_jpeg.only` must have 'jpeg', on which"),
    ],
)
def test_what_cannot_be_made_there_is_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_suite(tmp_path, *overrides, attacks=("transfer",), dip=False)


def test_what_does_not_apply_where_it_is_made_applies_nowhere(tmp_path: Path) -> None:
    short = "+attacks.from_jpeg.backward=short_dip"
    matrix = tiny_suite(tmp_path, *MADE_ON, short, attacks=("transfer",), dip=False)
    assert {cell.why for cell in matrix.cells if cell.label == "from_jpeg"} == {"no DIP"}
    weights = "+defense@defenses.comdefend=comdefend"
    matrix = tiny_suite(tmp_path, *MADE_ON, weights, attacks=("transfer",), dip=False)
    assert "weights" in str(matrix.cell("from_jpeg", "comdefend").why)
    assert matrix.cell("from_jpeg", "none").why is None
