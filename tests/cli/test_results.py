import csv

import pytest

from dipguard.cli.results import decision_line, write_decisions


def _row(name="a.png", before="cat", after="dog", **more):
    row = {"picture": name, "output": name, "before": before, "after": after, "changed": before != after}
    return {**row, "before_confidence": 0.997, "after_confidence": 0.5, "index": 3, **more}


def _written(folder, *rows):
    write_decisions(folder, rows)
    with (folder / "decisions.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_printed_line_says_what_changed():
    assert decision_line(_row()) == "a.png: cat 100% -> dog 50%, changed"
    assert decision_line(_row(after="cat")) == "a.png: cat 100% -> cat 50%"


@pytest.mark.parametrize("name", ["\x1b[31mred.png", "two\nlines.png", "a\rb.png", "not utf-8 \udcff.png"])
def test_names_cannot_write_to_the_terminal(name, tmp_path):
    assert decision_line(_row(name)).isprintable()
    assert decision_line({"picture": name, "problem": f"{name} is cut off"}).isprintable()
    (row,) = _written(tmp_path, _row(name))
    assert row["picture"].isprintable()


@pytest.mark.parametrize("name", ["=cmd|' calc'!A0.png", "+1.png", "-2.png", "@SUM(A1).png"])
def test_a_name_is_no_formula_for_a_spreadsheet(name, tmp_path):
    (row,) = _written(tmp_path, _row(name, before=name))
    assert row["picture"] == row["before"] == f"'{name}"


def test_files_hold_bad_pictures_too(tmp_path):
    good, bad = _written(tmp_path, _row("a|b.png"), {"picture": "bad.png", "problem": "cut off"})
    assert (good["picture"], good["before"], good["index"]) == ("a|b.png", "cat", "3")
    assert (bad["problem"], bad["before"]) == ("cut off", "")
