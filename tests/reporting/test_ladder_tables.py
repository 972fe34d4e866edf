"""The ladder's page and picture, from files as a run stores them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from dipguard.evaluation.ladder import CHECK_FIELDS
from dipguard.evaluation.ladder_results import FIELDS
from dipguard.reporting.canvas import DPI
from dipguard.reporting.ladder_figure import MARGIN, RUNG_HEIGHT, WIDTH, draw_ladder, write_ladder_figure
from dipguard.reporting.ladder_lines import read_checks, read_ladder, rows_of, rungs_of
from dipguard.reporting.ladder_tables import ladder_summary, write_ladder_table
from tests.reporting.stored_run import shares, write_lines

ROWS = ("none", "dipguard")
COST = {"purifications": 160, "dip_steps": 320_000, "victim_queries": 160, "gradients": 144, "seconds": 161.4}


def cell(rung: str, row: str, correct: int | None, **changes: Any) -> dict[str, Any]:
    names = {"data": "cifar10", "victim": "cifar10_resnet56", "row": row, "defense": row, "rung": rung, "attack": "x"}
    figures = {"status": "deterministic"} if correct is None else {**shares(correct, 16), "status": "done"}
    eps = {} if rung == "clean" else {"eps_255": 8}
    return {**names, **eps, **figures, **changes}


LINES = [
    cell("clean", "none", 15),
    cell("identity", "none", 0, number="2", **COST | {"dip_steps": 0}),
    cell("identity_eot", "none", None, number="4a"),
    cell("noise", "none", 14, check="control", **dict.fromkeys(COST, 0)),
    cell("large_eps", "none", 0, check="large_eps", eps_255=64, **COST | {"dip_steps": 0}),
    cell("worst_case", "none", 0, number="9"),
    cell("clean", "dipguard", 13, cut="400 of 2,000 DIP steps an image"),
    cell("identity", "dipguard", 9, number="2", options="steps 10, draws fixed", cut="steps 10 of 100", **COST),
    cell("identity_eot", "dipguard", None, number="4a", status="failed: RuntimeError: out | of <luck>"),
    cell("noise", "dipguard", 12, check="control", **dict.fromkeys(COST, 0)),
    cell("large_eps", "dipguard", 1, check="large_eps", eps_255=64, **COST),
    cell("worst_case", "dipguard", 9, number="9"),
    cell("clean", "baseline", 10, victim="cifar_cnn_a", defense="none"),
    cell("worst_case", "baseline", 4, victim="cifar_cnn_a", defense="none", number="9"),
]
CHECKS = [
    {"row": row, "check": "a large eps reaches 0 %", "verdict": verdict, "figures": f"{n} of 16 right at 64/255"}
    for row, verdict, n in (("none", "ok", 0), ("dipguard", "WARNING", 1))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "ladder.csv", FIELDS, LINES)
    write_lines(tmp_path / "ladder_checks.csv", CHECK_FIELDS, CHECKS)
    return tmp_path


def rows_after(text: str, heading: str) -> dict[str, list[str]]:
    """The first table after a heading, by its first column."""
    table = [line for line in text.split(heading, 1)[1].split("\n\n## ")[0].splitlines() if line.startswith("|")]
    parsed = [[part.strip() for part in line.replace("\\|", "!").strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in parsed}


def test_accuracies_have_their_intervals_and_gaps_their_reason(folder: Path) -> None:
    text = write_ladder_table(folder).read_text(encoding="utf-8")
    table = rows_after(text, "# The ladder")
    assert table["rung"] == ["none", "dipguard", "baseline: cifar_cnn_a"]
    assert table["clean"] == ["93.8 (72–99)", "81.2 (57–93)", "62.5 (39–82)"]
    assert table["2 identity"] == ["0.0 (0–19)", "56.2 (33–77)", "–"]
    assert table["4a identity eot"] == ["deterministic", "failed", "–"]
    assert table["noise (control)"][1] == "75.0 (51–90)"
    assert table["9 worst case"] == ["0.0 (0–19)", "56.2 (33–77)", "25.0 (10–49)"]
    assert list(table)[-1] == "9 worst case"
    assert "- 4a identity eot, dipguard: failed: RuntimeError: out \\| of &lt;luck>" in text


def test_costs_cuts_and_checks_are_told(folder: Path) -> None:
    text = write_ladder_table(folder).read_text(encoding="utf-8")
    costs = rows_after(text, "## What it cost")
    assert costs["2 identity"][:2] == ["0 / 160 / 161 s", "320,000 / 160 / 161 s"]
    assert costs["sum"][1] == "640,000 / 320 / 323 s"
    assert "clean" not in costs
    settings = rows_after(text, "## Settings, and what was cut")
    assert settings["2 identity"] == ["x", "eps 8/255, steps 10, draws fixed", "steps 10 of 100", "–"]
    assert settings["large eps (check)"][1] == "eps 64/255"
    assert "- dipguard: 400 of 2,000 DIP steps an image" in text
    assert rows_after(text, "## Masking checks")["a large eps reaches 0 %"] == ["ok", "WARNING"]
    assert "- a large eps reaches 0 %: **WARNING**. 1 of 16 right at 64/255" in text
    assert "WARNING" in ladder_summary(folder)
    assert "What it cost" not in ladder_summary(folder)


def test_lines_come_back_as_they_were_written(folder: Path) -> None:
    cells = read_ladder(folder / "ladder.csv")
    assert rows_of(cells) == ["none", "dipguard", "baseline"]
    assert rungs_of(cells) == ["clean", "identity", "identity_eot", "noise", "large_eps", "worst_case"]
    by = {(c.rung, c.row): c for c in cells}
    assert (by["identity", "dipguard"].correct, by["identity", "dipguard"].n) == (9, 16)
    assert by["identity", "dipguard"].seconds == 161.4
    assert by["identity_eot", "none"].accuracy is None
    assert by["clean", "none"].eps_255 is None
    assert [check.verdict for check in read_checks(folder / "ladder_checks.csv")] == ["ok", "WARNING"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 0.1}, "`accuracy` must be 9 of 16"),
        ({"correct": 17}, "`correct` must be a number from 0 to 16"),
        ({"status": "deterministic"}, "`accuracy` must be empty where `status` is 'deterministic'"),
        ({"dip_steps": -1}, "`dip_steps` must be a number from 0"),
        ({"rung": ""}, "`rung` must be filled in"),
        ({"row": "none"}, "the same as"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    lines = [line | changes if (line["rung"], line["row"]) == ("identity", "dipguard") else line for line in LINES]
    with pytest.raises(ValueError, match=message):
        read_ladder(write_lines(tmp_path / "ladder.csv", FIELDS, lines))


def test_nothing_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_ladder_table(tmp_path)
    write_lines(tmp_path / "ladder.csv", FIELDS, [])
    with pytest.raises(ValueError, match="holds no cell yet"):
        write_ladder_table(tmp_path)
    with pytest.raises(ValueError, match="at least one cell"):
        draw_ladder([])


def test_the_picture_shows_each_row_where_it_stands(folder: Path) -> None:
    cells = read_ladder(folder / "ladder.csv")
    figure = draw_ladder(cells)
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines() if line.get_marker() not in ("None", "")}
    assert set(lines) == {"none", "dipguard", "baseline"}
    assert list(lines["none"].get_xdata()) == pytest.approx([93.75, 0, 87.5, 0, 0])
    assert [round(y) for y in lines["none"].get_ydata()] == [0, 1, 3, 4, 5]  # a gap where there is no figure
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "clean", "2 identity", "4a identity eot", "noise (control)", "large eps (check)", "9 worst case",
    ]  # fmt: skip
    bars = ax.collections[0].get_segments()
    assert [list(bar[:, 0]) for bar in bars][1] == pytest.approx([0, 100 * float(LINES[1]["high"])])
    picture = matplotlib.image.imread(write_ladder_figure(folder))
    assert picture.shape[:2] == (round((6 * RUNG_HEIGHT + MARGIN) * DPI), round(WIDTH * DPI))
    assert (picture[..., :3] < 0.95).any(axis=2).mean() > 0.03


def test_csv_fields_are_those_that_are_read(folder: Path) -> None:
    with (folder / "ladder.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == FIELDS
