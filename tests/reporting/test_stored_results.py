from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dipguard.reporting.stored_results import read_curves, read_results
from tests.reporting.stored_run import (
    CURVE_FIELDS,
    NO_WEIGHTS,
    RESULT_FIELDS,
    cell,
    point,
    write_curves,
    write_lines,
    write_results,
)


def test_cells_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = [cell("pgd_8", "jpeg", 20), cell("clean", "none", 30, psnr="inf", ssim=1), cell("clean", "nrp", None)]
    one, two, three = read_results(write_results(tmp_path, lines))
    assert {name: getattr(one, name) for name in RESULT_FIELDS} == lines[0]
    assert (one.eps_255, one.done, two.eps_255, two.psnr) == (8.0, True, None, float("inf"))
    assert (three.done, three.status, three.n) == (False, NO_WEIGHTS, None)
    assert three.accuracy is three.ssim is three.low is None


def test_points_come_back_as_they_were_written(tmp_path: Path) -> None:
    line = point("hopskipjump", "jpeg", 2.5, 1000, 7)
    (read,) = read_curves(write_curves(tmp_path, [line]))
    stored = set(CURVE_FIELDS) - {"purifications", "dip_steps", "victim_queries", "seconds"}
    assert {name: getattr(read, name) for name in stored} == {name: line[name] for name in stored}


def test_further_columns_and_another_order_do_no_harm(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.csv", [*reversed(RESULT_FIELDS), "more"], [cell("cw", "jpeg", 3, more="x, y")])
    assert [read.correct for read in read_results(path)] == [3]


def test_head_alone_is_no_result(tmp_path: Path) -> None:
    assert read_results(write_results(tmp_path, [])) == []


def test_judge_is_the_victim_unless_named(tmp_path: Path) -> None:
    lines = [cell("cw", "jpeg", 3, judge=""), cell("cw", "jpeg", 3, judge="other")]
    assert [r.judge for r in read_results(write_results(tmp_path, lines))] == ["cifar10_resnet56", "other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": "ninety"}, r"line 3: `accuracy` must be a number from 0 to 1, got 'ninety'"),
        ({"accuracy": "nan"}, r"`accuracy` must be a number"),
        ({"accuracy": 90.6}, r"`accuracy` must be a number from 0 to 1, got '90.6'"),
        ({"accuracy": 0.5}, r"`accuracy` must be 20 of 32"),
        ({"accuracy": ""}, r"`accuracy` must be a number"),
        ({"low": 0.7}, r"`accuracy` must be in its interval from 0.7"),
        ({"correct": 33}, r"`correct` must be a number from 0 to 32, got '33'"),
        ({"correct": 19.5}, r"`correct` must be a whole number"),
        ({"n": 0}, r"`n` must be a number from 1"),
        ({"ssim": 1.5}, r"`ssim` must be a number from -1 to 1"),
        ({"psnr": "nan"}, r"`psnr` must be a number"),
        ({"seed": ""}, r"`seed` must be a number"),
        ({"eps_255": -1}, r"`eps_255` must be a number from 0 to 255"),
        ({"row": " "}, r"`row` must be filled in"),
        ({"status": ""}, r"`status` must be filled in"),
        ({"status": "weights not supplied"}, r"`correct` must be empty where `status` is 'weights not supplied'"),
        ({"column": "clean", "attack": "none", "eps_255": ""}, r"line 3: the same as .*line 2.*column clean, row jpeg"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_results(tmp_path, [cell("clean", "jpeg", 30), cell("pgd_8", "jpeg", 20) | changes])
    with pytest.raises(ValueError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "pgd"}, r"line 2: `attack` must be bpda or hopskipjump, got 'pgd'"),
        ({"eps_255": ""}, r"`eps_255` must be a number"),
        ({"budget": 1.5}, r"`budget` must be a whole number"),
        ({"n": ""}, r"`n` must be a number"),
    ],
)
def test_damaged_points_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_curves(tmp_path, [point("bpda", "jpeg", 8, 15, 3) | changes])
    with pytest.raises(ValueError, match=message):
        read_curves(path)


@pytest.mark.parametrize("lost", ["accuracy", "status", "row"])
def test_lost_columns_are_named(tmp_path: Path, lost: str) -> None:
    line = cell("cw", "jpeg", 3)
    del line[lost]
    path = write_lines(tmp_path / "a.csv", line, [line])
    with pytest.raises(ValueError, match=f"it lacks {lost}$"):
        read_results(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "must have the columns data, victim"),
        (lambda content: content[:-30], "line 2: must have 19 values"),
        (lambda content: content[:-2] + b",1,2\r\n", "line 2: must have 19 values"),
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
