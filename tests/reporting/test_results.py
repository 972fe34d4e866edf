from pathlib import Path

import pandas as pd
import pytest

from dipguard.evaluation.results import CHECK_FIELDS, FIELDS
from dipguard.reporting.results import TEXT, in_suite, read_checks, read_results
from tests.reporting.stored_run import NO_WEIGHTS, cell, point, write_lines, write_results


def test_cells_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = [
        cell("pgd_8", "jpeg", 20),
        cell("clean", "none", 30, psnr="inf", ssim=1),
        cell("clean", "nrp", None),
        point("hopskipjump", "jpeg", 2.5, 1000, 7),
    ]
    table = read_results(write_results(tmp_path, lines))
    assert list(table.columns) == list(FIELDS)
    for line, (_, row) in zip(lines, table.iterrows(), strict=True):
        for name in FIELDS:
            expected = line.get(name, "")
            if name not in TEXT:
                assert pd.isna(row[name]) if expected == "" else row[name] == float(expected)
            else:
                assert row[name] == expected
    one, two, three, four = (row for _, row in table.iterrows())
    assert (one["eps_255"], two["psnr"]) == (8.0, float("inf"))
    assert (three["status"], pd.isna(three["accuracy"])) == (NO_WEIGHTS, True)
    assert (four["eps_255"], four["budget"]) == (2.5, 1000)


def test_further_columns_and_another_order_do_no_harm(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", [*reversed(FIELDS), "more"], [cell("cw", "jpeg", 3, more="x, y")])
    table = read_results(path)
    assert (table["correct"].tolist(), table["more"].tolist()) == ([3], ["x, y"])


def test_head_alone_is_no_result(tmp_path: Path) -> None:
    assert len(read_results(write_results(tmp_path, []))) == 0


def test_numbered_attacks_checks_and_the_worst_case_are_the_suites(tmp_path: Path) -> None:
    lines = [
        cell("clean", "none", 30),
        cell("identity", "none", 3, number="2"),
        cell("noise", "none", 3, check="control"),
        cell("worst_case", "none", 3),
        cell("pgd_8", "none", 3),
    ]
    assert in_suite(read_results(write_results(tmp_path, lines))).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("name", ["accuracy", "budget", "n"])
def test_text_in_the_place_of_a_number_is_refused(tmp_path: Path, name: str) -> None:
    path = write_results(tmp_path, [cell("clean", "jpeg", 30), cell("pgd_8", "jpeg", 20) | {name: "ninety"}])
    with pytest.raises(ValueError, match=f"results.csv: `{name}` must hold numbers: .*ninety"):
        read_results(path)


@pytest.mark.parametrize("lost", ["accuracy", "status", "defense"])
def test_lost_columns_are_named(tmp_path: Path, lost: str) -> None:
    fields = [name for name in FIELDS if name != lost]
    line = {name: value for name, value in cell("cw", "jpeg", 3).items() if name != lost}
    with pytest.raises(ValueError, match=f"it lacks {lost}$"):
        read_results(write_lines(tmp_path / "a.csv", fields, [line]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "must be a CSV file in UTF-8, but it is damaged: No columns"),
        (lambda content: content + b'"cut', "damaged"),
        (lambda content: content + b"\xff\xfe\xfa", "must be a CSV file in UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    path = write_results(tmp_path, [cell("cw", "jpeg", 3)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "results.csv")


def test_checks_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = [dict(zip(CHECK_FIELDS, ("none", name, "ok", "x, y"), strict=True)) for name in ("a", "b")]
    table = read_checks(write_lines(tmp_path / "checks.csv", CHECK_FIELDS, lines))
    assert table.to_dict("records") == lines
