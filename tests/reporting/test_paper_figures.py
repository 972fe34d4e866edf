from __future__ import annotations

import pytest

from dipguard.reporting.paper_figures import ATTACKS, TABLE_1, TABLE_2, head_of, paper_data

ROWS = [(table, data, name) for table in (TABLE_1, TABLE_2) for data in table for name in table[data]]


@pytest.mark.parametrize(("table", "data", "name"), ROWS)
def test_printed_mean_is_that_of_the_fifteen_columns(table, data: str, name: str) -> None:
    row = table[data][name]
    assert len(row.figures) == len(ATTACKS) == 15
    mean = sum(row.figures.values()) / 15
    last = 0.1 if table is TABLE_1 else 0.001  # the paper cuts off where it does not round
    if (table is TABLE_1, data, name) == (True, "CIFAR-10", "DIPDefend"):
        assert (row.mean, round(mean, 1)) == (71.5, 72.5)
    else:
        assert mean - last < row.mean <= mean + last / 2 + 1e-9


@pytest.mark.parametrize(
    ("table", "data", "column", "other", "margin"),
    [
        (TABLE_1, "CIFAR-10", "pgd_8", "DIPDefend", 9.5),
        (TABLE_1, "CIFAR-10", "cw", "DIPDefend", 9.6),
        (TABLE_1, "CIFAR-10", "ddn", "DIPDefend", 6.8),
        (TABLE_2, "CIFAR-10", "ddn", "ComDefend", 0.036),
        (TABLE_2, "ImageNet", "ddn", "SR", 0.056),
    ],
)
def test_margins_that_the_text_states(table, data: str, column: str, other: str, margin: float) -> None:
    proposed, compared = (table[data][name].figures[column] for name in ("Proposed", other))
    assert proposed - compared == pytest.approx(margin)


@pytest.mark.parametrize(("other", "margin"), [("SR", 9.2), ("DIPDefend", 13.7)])
def test_margins_of_the_imagenet_means(other: str, margin: float) -> None:
    assert TABLE_1["ImageNet"]["Proposed"].mean - TABLE_1["ImageNet"][other].mean == pytest.approx(margin)


def test_table_2_has_no_row_without_a_defence() -> None:
    assert [set(TABLE_1[data]) - set(TABLE_2[data]) for data in TABLE_1] == [{"No defense"}] * 2


@pytest.mark.parametrize(
    ("label", "head", "known"),
    [("clean", "Clean", True), ("mifgsm_4", "MIFGSM 4", True), ("cw", "C&W", True), ("pgd_16", "pgd_16", False)],
)
def test_columns_are_found_by_their_labels(label: str, head: str, known: bool) -> None:
    assert head_of(label) == head
    assert (label in ATTACKS) == known


@pytest.mark.parametrize(
    ("data", "victim", "expected"),
    [
        ("cifar10", "mine", "CIFAR-10"),
        ("CIFAR-10 report", "mine", "CIFAR-10"),
        ("arrays", "cifar10_resnet56", "CIFAR-10"),
        ("cifar100", "mine", None),
        ("image_folder", "torchvision", "ImageNet"),
        ("nips2017", "mine", "ImageNet"),
        ("arrays", "mine", None),
        ("digits", "digits_cnn", None),
        ("digits", "cifar10_resnet56", None),
    ],
)
def test_kind_of_data_is_told_by_its_name_or_its_victim(data: str, victim: str, expected: str | None) -> None:
    assert paper_data(data, victim) == expected
