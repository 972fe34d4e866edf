import csv

import pytest

from dipguard.cli.results import MOST_PRINTED, format_decisions, write_decisions


def _row(name="a.png", before="cat", after="dog", **more):
    row = {"picture": name, "output": name, "before": before, "after": after, "changed": before != after}
    return {**row, "before_confidence": 0.997, "after_confidence": 0.5, "index": 3, **more}


def test_printed_columns_stand_below_each_other():
    text = format_decisions([_row(), _row("much_longer.png", before="hippopotamus", after="hippopotamus")])
    head, first, second = text.splitlines()
    assert head.index("before") == first.index("cat 100%") == second.index("hippopotamus 100%")
    assert head.index("after") == first.index("dog 50%")
    assert first.endswith("changed")
    assert not second.endswith("changed")


@pytest.mark.parametrize("name", ["\x1b[31mred.png", "two\nlines.png", "a\rb.png"])
def test_names_cannot_write_to_the_terminal(name, tmp_path):
    assert len(format_decisions([_row(name)]).splitlines()) == 2
    assert format_decisions([_row(name)]).replace("\n", "").isprintable()
    write_decisions(tmp_path, [_row(name)])
    assert len((tmp_path / "decisions.md").read_text().splitlines()) == 3


def test_a_long_table_is_cut_on_the_screen_alone(tmp_path):
    rows = [_row(f"{i}.png") for i in range(MOST_PRINTED + 5)]
    assert format_decisions(rows).splitlines()[-1] == "... and 5 more in decisions.csv"
    write_decisions(tmp_path, rows)
    assert len((tmp_path / "decisions.md").read_text().splitlines()) == len(rows) + 2


def test_files_hold_bad_pictures_too_and_no_cell_breaks_the_table(tmp_path):
    write_decisions(tmp_path, [_row("a|b.png"), {"picture": "bad.png", "problem": "cut off"}])
    with (tmp_path / "decisions.csv").open(newline="", encoding="utf-8") as stream:
        good, bad = csv.DictReader(stream)
    assert (good["picture"], good["before"], good["index"]) == ("a|b.png", "cat", "3")
    assert (bad["problem"], bad["before"]) == ("cut off", "")
    lines = (tmp_path / "decisions.md").read_text().splitlines()
    assert "a\\|b.png" in lines[2]
    assert "cut off" in lines[3]


def test_hostile_names_are_neither_formulas_nor_html(tmp_path):
    names = ["=cmd|' calc'!A0.png", "<img src=x onerror=alert(1)>.png"]
    write_decisions(tmp_path, [_row(names[0], after="@sum"), _row(names[1], before="+1")])
    with (tmp_path / "decisions.csv").open(newline="", encoding="utf-8") as stream:
        cells = [cell for line in csv.reader(stream) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert "<" not in (tmp_path / "decisions.md").read_text()
