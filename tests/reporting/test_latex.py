from __future__ import annotations

import re
from pathlib import Path

import pytest

from dipguard.reporting.latex import escape
from dipguard.reporting.matrix_tables import write_tables
from tests.reporting.stored_run import PAPER_COLUMNS, cell, write_results


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fgsm_2 & C&W: 50 % #1 $x$ {a}", r"fgsm\_2 \& C\&W: 50 \% \#1 \$x\$ \{a\}"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("<a|b>", r"\textless{}a\textbar{}b\textgreater{}"),
        ("two\nlines\t\x07", "two lines "),
        ("1–2 …", r"1--2 \dots{}"),
        ("plain text, é", "plain text, é"),
    ],
)
def test_special_characters_are_escaped(text: str, expected: str) -> None:
    assert escape(text) == expected


def body(tex: str) -> list[str]:
    return [line for line in tex.splitlines() if line.endswith(r"\\")]


def width(line: str) -> int:
    """Columns that a line of a table takes."""
    cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
    spans = [re.search(r"\\multicolumn\{(\d+)\}", text) for text in cells]
    return sum(1 if span is None else int(span[1]) for span in spans)


@pytest.mark.parametrize("name", ["jpeg", "a_b & 100 % {mine} \\today $1^2~"])
def test_every_line_is_as_wide_as_the_table_and_every_brace_is_closed(tmp_path: Path, name: str) -> None:
    lines = [cell(column, row, 9) for column in [*PAPER_COLUMNS, "own_1"] for row in ("none", "paper")]
    lines += [cell("own_1", name, 4), *(cell(column, "nrp", None) for column in PAPER_COLUMNS)]
    write_results(tmp_path, lines)
    for path in write_tables(tmp_path):
        if path.suffix != ".tex":
            continue
        tex = path.read_text()
        assert {width(line) for line in body(tex)} == {1 + 16 + 1}
        assert re.search(r"\\begin\{tabular\}\{lr{17}\}", tex)
        assert escape(name) in tex
        bare = re.sub(r"\\[\\{}]", "", tex)
        assert bare.count("{") == bare.count("}")
        assert re.findall(r"\\begin\{(\w+\*?)\}", tex) == ["table*", "tabular", "minipage"]
        assert re.findall(r"\\end\{(\w+\*?)\}", tex) == ["tabular", "minipage", "table*"]
        outside = re.sub(r"\$[+-][\d.]+\$|\\.|%.*\n", "", tex)
        assert not re.search(r"[$#^~]", outside.replace("\\", ""))


def test_rows_hold_figures_intervals_and_the_papers(tmp_path: Path) -> None:
    write_results(
        tmp_path, [cell("clean", "paper", 24), cell("pgd_4", "paper", 16, ssim=0.75), cell("clean", "nrp", None)]
    )
    write_tables(tmp_path)
    lines = body((tmp_path / "table1.tex").read_text())
    assert lines[0] == r" & \multicolumn{1}{c}{Clean} & \multicolumn{1}{c}{PGD} & Mean \\"
    assert lines[1] == r"Defence &  & 4 & of 2 \\"
    assert lines[2] == r"paper & 75.0 & 50.0 & 62.5 \\"
    assert lines[3] == r" & {\tiny 58--87} & {\tiny 34--66} &  \\"
    assert lines[4] == r"Ding et al.: Proposed & 85.6 & 86.9 & 86.2 \\"
    assert lines[5] == r"difference & $-10.6$ & $-36.9$ & $-23.8$ \\"
    assert lines[6] == r"nrp & \multicolumn{3}{l}{weights not supplied} \\"
    assert lines[7] == r"Ding et al.: NRP & 90.9 & 35.1 & 63.0 \\"
    assert len(lines) == 8
    assert r"paper & 0.900 & 0.750 & 0.825 \\" in body((tmp_path / "table2.tex").read_text())


def test_attacks_stand_once_over_their_columns(tmp_path: Path) -> None:
    write_results(tmp_path, [cell(column, "none", 9) for column in PAPER_COLUMNS])
    write_tables(tmp_path)
    heads = body((tmp_path / "table2.tex").read_text())[0]
    assert re.findall(r"\{(\d)\}\{c\}\{([^}]+)\}", heads) == [
        ("1", "Clean"), ("3", "FGSM"), ("3", "PGD"), ("3", "BIM"), ("3", "MIFGSM"), ("1", r"C\&W"), ("1", "DDN"),
    ]  # fmt: skip


def test_two_victims_are_two_tables_of_different_names(tmp_path: Path) -> None:
    write_results(tmp_path, [cell("cw", "none", 9), cell("cw", "none", 9, seed=1)])
    write_tables(tmp_path)
    tex = (tmp_path / "table1.tex").read_text()
    assert re.findall(r"\\label\{(.*)\}", tex) == ["tab:dipguard-accuracy", "tab:dipguard-accuracy-2"]
