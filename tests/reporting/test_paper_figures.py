import pytest

from dipguard.reporting.paper_figures import ATTACKS, TABLE_1, TABLE_2, head_of, paper_data

ROWS = [(table, data, name) for table in (TABLE_1, TABLE_2) for data in table for name in table[data]]
MEANS = [
    28.7, 61.3, 38.8, 44.9, 71.5, 79.9, 7.35, 28.4, 59.5, 28.6, 55.0, 68.7,
    0.912, 0.884, 0.879, 0.888, 0.923, 0.840, 0.863, 0.830, 0.764, 0.892,
]  # fmt: skip
"""As the paper prints them."""


@pytest.mark.parametrize(("row", "printed"), list(zip(ROWS, MEANS, strict=True)))
def test_printed_mean_is_that_of_the_fifteen_columns(row, printed: float) -> None:
    table, data, name = row
    assert len(table[data][name]) == len(ATTACKS) == 15
    mean = sum(table[data][name].values()) / 15
    last = 0.1 if table is TABLE_1 else 0.001  # the paper cuts off where it does not round
    if printed == 71.5:
        assert round(mean, 1) == 72.5
    else:
        assert mean - last < printed <= mean + last / 2 + 1e-9


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
    proposed, compared = (table[data][name][column] for name in ("Proposed", other))
    assert proposed - compared == pytest.approx(margin)


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
        ("image_folder", "torchvision:mobilenet_v2", "ImageNet"),
        ("image_folder", "timm:mobilenetv2_100", "ImageNet"),
        ("image_folder", "huggingface:owner/vit-cifar10", "CIFAR-10"),
        ("image_folder", "huggingface:owner/vit-cifar100", None),
        ("nips2017", "mine", "ImageNet"),
        ("arrays", "mine", None),
        ("digits", "digits_cnn", None),
        ("digits", "cifar10_resnet56", None),
    ],
)
def test_kind_of_data_is_told_by_its_name_or_its_victim(data: str, victim: str, expected: str | None) -> None:
    assert paper_data(data, victim) == expected
