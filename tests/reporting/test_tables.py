import random
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from dipguard.reporting import tables
from dipguard.reporting.escape import escape_csv, escape_latex, escape_markdown
from dipguard.reporting.results import read_results
from dipguard.reporting.tables import tables_text
from tests.reporting.stored_run import PAPER_ATTACKS, cell, write_results

ROWS = {"none": "none", "jpeg": "jpeg", "dipdefend": "dipdefend", "paper": "paper", "best": "mirror"}
# The paper's Table 1, CIFAR-10, typed once more from the page for the rows and columns that are looked at here.
PROPOSED = [85.6, 80.4, 79.8, 60.1, 87.5, 86.9, 83.1, 84.6, 86.7, 76.1, 83.4, 79.9, 60.4, 80.8, 83.4]


def written(folder: Path, lines: Sequence[dict[str, Any]] = (), *, name: str = "table1.md") -> str:
    """A file of the tables of these lines, or of those that are there already."""
    if lines:
        write_results(folder, lines)
    tables.write_tables(folder, read_results(folder / "results.csv"))
    return (folder / name).read_text()


@pytest.fixture
def full(tmp_path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """All 15 attacks on five defences and on one without weights, in a mixed order; returned by (defence, attack)."""
    draw = random.Random(3)
    lines = [
        cell(column, row, draw.randint(0, 32), ssim=round(draw.uniform(0.6, 1), 6), defense_name=name)
        for column in reversed(PAPER_ATTACKS)
        for row, name in ROWS.items()
    ]
    lines += [cell(column, "nrp", None) for column in PAPER_ATTACKS]
    write_results(tmp_path, lines)
    return {(line["defense"], line["attack"]): line for line in lines}


def tables_of(page: str) -> list[dict[str, list[str]]]:
    """The tables of a page of Markdown: cells by the first cell of their line; later lines of one name win."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", page + "\n", flags=re.MULTILINE)
    return [
        {cells[0]: cells[1:] for line in block.splitlines() if (cells := [c.strip() for c in line[1:-1].split(" | ")])}
        for block in blocks
    ]


@pytest.mark.parametrize(("number", "field", "scale", "digits"), [(1, "accuracy", 100, 1), (2, "ssim", 1, 3)])
def test_main_table_holds_the_figures_in_the_papers_order(
    tmp_path: Path, full, number: int, field: str, scale: float, digits: int
) -> None:
    table = tables_of(written(tmp_path, name=f"table{number}.md"))[0]
    heads = "Clean,FGSM 2,FGSM 4,FGSM 8,PGD 2,PGD 4,PGD 8,BIM 2,BIM 4,BIM 8,MIFGSM 2,MIFGSM 4,MIFGSM 8,C&W,DDN"
    assert table["defence"] == [*heads.split(","), "mean of 15"]
    for row in ROWS:
        values = [scale * full[row, column][field] for column in PAPER_ATTACKS]
        expected = [*values, sum(values) / 15]
        assert [float(text) for text in table[row]] == pytest.approx(expected, abs=0.5 * 10**-digits + 1e-9)
        assert all(re.fullmatch(rf"\d+\.\d{{{digits}}}", text) for text in table[row])


def test_row_without_weights_says_so_and_has_no_number(tmp_path: Path, full) -> None:
    for number in (1, 2):
        page = written(tmp_path, name=f"table{number}.md")
        assert tables_of(page)[0]["nrp: weights not supplied"] == ["–"] * 16
        assert "- nrp: weights not supplied. Give `weights`, the path of a state dict; the authors' file" in page
        tex = (tmp_path / f"table{number}.tex").read_text()
        assert re.search(r"nrp: weights not supplied( & --){16} ", tex)
    main = tables_text(read_results(tmp_path / "results.csv"))
    assert main.count("| nrp: weights not supplied |") == 2


def test_intervals_are_those_stored(tmp_path: Path, full) -> None:
    intervals = tables_of(written(tmp_path))[1]
    for row in ROWS:
        ends = [[100 * full[row, column][end] for end in ("low", "high")] for column in PAPER_ATTACKS]
        assert intervals[row] == [f"{low:.0f}–{high:.0f}" for low, high in ends]
    assert "nrp" not in intervals
    assert "intervals" not in (tmp_path / "table2.md").read_text()


def beside(page: str, row: str) -> tuple[list[str], list[str]]:
    """The paper's figures beside a defence, and the differences."""
    lines = page.split("### Compared with the paper")[1].splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {row} "))
    paper, difference = ([cell.strip() for cell in line.strip("|").split(" | ")][1:] for line in lines[at + 1 : at + 3])
    return paper, difference


@pytest.mark.parametrize("row", ["paper", "best"])
def test_paper_stands_beside_the_proposed_defence(tmp_path: Path, full, row: str) -> None:
    paper, difference = beside(written(tmp_path), row)
    assert paper == [f"{printed:.1f}" for printed in (*PROPOSED, 79.91)]
    ours = [100 * full[row, column]["accuracy"] for column in PAPER_ATTACKS]
    expected = [own - printed for own, printed in zip(ours, PROPOSED, strict=True)]
    assert [float(text) for text in difference] == pytest.approx([*expected, fmean(expected)], abs=0.051)


def test_markdown_shows_ours_the_papers_and_the_difference(tmp_path: Path, full) -> None:
    page = written(tmp_path)
    table = tables_of(page)[2]
    assert [table["Ding et al.: DIPDefend"][i] for i in (0, 7, 15)] == ["83.2", "79.2", "72.5"]
    assert table["Ding et al.: NRP"][-1] == "44.9"
    assert table["nrp"] == ["–"] * 16
    clean = 100 * full["best", "clean"]["accuracy"] - 85.6
    assert table["difference"][0] == f"{clean:+.1f}"
    assert "another victim and other images" in page
    assert "jpeg" not in table


def test_paper_has_no_ssim_without_a_defence(tmp_path: Path, full) -> None:
    page = written(tmp_path, name="table2.md")
    assert beside(page, "dipdefend")[0][8] == "0.899"
    assert "No defense" not in page
    assert "none" in tables_of(page)[0]


def test_missing_cells_are_told_and_the_mean_says_over_how_many(tmp_path: Path, full) -> None:
    gone = [("paper", "ddn"), ("paper", "fgsm_2"), ("jpeg", "cw")]
    page = written(tmp_path, [line for key, line in full.items() if key not in gone])
    main, _, compared = tables_of(page)
    left = [column for column in PAPER_ATTACKS if ("paper", column) not in gone]
    mean = fmean(100 * full["paper", column]["accuracy"] for column in left)
    assert main["paper"][-1] == f"{mean:.1f} (13 of 15)"
    assert (main["paper"][1], main["paper"][14]) == ("", "")
    assert "- paper: FGSM 2, DDN: not run yet" in page
    assert "- jpeg: C&W: not run yet" in page
    given = [figure for figure, column in zip(PROPOSED, PAPER_ATTACKS, strict=True) if column in left]
    paper, difference = beside(page, "paper")
    assert paper[-1] == f"{fmean(given):.1f} (13 of 15)"
    assert compared["paper"][-1] == main["paper"][-1]
    assert float(difference[-1].split(" (")[0]) == pytest.approx(mean - fmean(given), abs=0.051)


def test_own_rows_and_columns_have_no_figure_in_the_paper(tmp_path: Path) -> None:
    lines = [cell(column, row, 16) for column in ("clean", "my_attack") for row in ("none", "mine | yours")]
    page = written(tmp_path, [*lines, cell("my_attack", "sr", 8, defense_name="my_sr")])
    main, _, compared = tables_of(page.replace("\\|", "/"))
    assert main["defence"] == ["Clean", "my_attack", "mean of 2"]
    assert main["mine / yours"] == ["50.0", "50.0", "50.0"]
    assert compared[""] == ["Clean", "mean of 1"]
    assert [name for name in compared if set(name) - set(":-| ")] == ["none", "Ding et al.: No defense", "difference"]
    assert "The mean is over the 2 attacks of this run.\n" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "digits", "victim": "digits_cnn"}, {"defense_name": "mine"}, {"surrogate": "another"},
        {"eps_255": 16}, {"attack_name": "bim"},
    ],
)  # fmt: skip
def test_what_the_paper_did_not_measure_is_not_put_beside_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "Ding et al." not in written(tmp_path, [cell("pgd_8", "paper", 16) | changes])


@pytest.mark.parametrize(
    ("victim", "other"),
    [("torchvision:resnet101", "other images"), ("torchvision:mobilenet_v2", "another victim and other images")],
)
def test_imagenet_rows_meet_the_papers_imagenet_rows(tmp_path: Path, victim: str, other: str) -> None:
    names = {"data": "image_folder", "victim": victim}
    page = written(tmp_path, [cell("pgd_8", "sr", 3, n=6) | names])
    assert beside(page, "sr") == (["49.3", "49.3"], ["+0.7", "+0.7"])
    assert f"ours on image_folder with {victim}: {other}, and settings" in page
    assert "6 images a cell." in page


def test_each_victim_and_seed_has_a_table_of_its_own(tmp_path: Path) -> None:
    lines = [cell("cw", "jpeg", 16), cell("cw", "jpeg", 8, seed=1), cell("cw", "jpeg", 4, n=8, victim="other")]
    lines.append(cell("cw", "jpeg", 4, n=8, surrogate="other"))
    page = written(tmp_path, lines)
    assert re.findall(r"^## (.*)$", page, flags=re.MULTILINE) == [
        "cifar10, victim cifar10_resnet56, seed 0",
        "cifar10, victim cifar10_resnet56, seed 1",
        "cifar10, victim other, seed 0",
        "cifar10, victim cifar10_resnet56, surrogate other, seed 0",
    ]
    assert [table["jpeg"][0] for table in tables_of(page)[::2]] == ["50.0", "25.0", "50.0", "50.0"]


def test_numbers_of_images_are_given(tmp_path: Path) -> None:
    assert "1 to 20 images a cell." in written(tmp_path, [cell("cw", "jpeg", 1, n=1), cell("ddn", "jpeg", 8, n=20)])


def test_ssim_that_was_not_stored_is_told(tmp_path: Path) -> None:
    page = written(tmp_path, [cell("cw", "sr", 8) | {"ssim": ""}, cell("ddn", "sr", 8, ssim=0.5)], name="table2.md")
    assert tables_of(page)[0]["sr"] == ["–", "0.500", "0.500 (1 of 2)"]
    assert "- sr: C&W: no SSIM stored" in page


def test_run_without_any_figure_has_tables_without_numbers(tmp_path: Path) -> None:
    page = written(tmp_path, [cell("cw", "nrp", None)])
    assert "No cell has figures yet." in page
    assert "intervals" not in page


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
    assert escape_latex(text) == expected


@pytest.mark.parametrize(
    ("text", "csv", "markdown"),
    [
        ("=cmd|' calc'!A0.png", "'=cmd|' calc'!A0.png", "=cmd\\|' calc'!A0.png"),
        ("<img src=x onerror=a()>", "<img src=x onerror=a()>", "&lt;img src=x onerror=a()>"),
        ("![a](http://b) *c*", "![a](http://b) *c*", "!\\[a\\](http://b) \\*c\\*"),
        ("+1 -2", "'+1 -2", "+1 -2"),
        ("@sum", "'@sum", "@sum"),
        ("\t=1", "'\t=1", "=1"),
        ("a_b = 1\\2", "a_b = 1\\2", "a_b = 1\\\\2"),
        ("", "", ""),
    ],
)
def test_hostile_names_are_escaped_for_each_format(text: str, csv: str, markdown: str) -> None:
    assert escape_csv(text) == csv
    assert escape_markdown(text) == markdown


def test_hostile_names_and_reasons_are_escaped_on_the_page(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=a()> | b"
    page = written(tmp_path, [cell("clean", name, 4, victim=hostile) for name in (hostile, "jpeg")])
    write_results(tmp_path, [cell("clean", "jpeg", 4), cell("cw", "jpeg", None, status=f"failed: {hostile}")])
    pages = [page, tables_text(read_results(tmp_path / "results.csv"))]
    assert "&lt;img src=x onerror=a()> \\| b" in page
    assert not any("<img" in page for page in pages)


def body(tex: str) -> list[str]:
    return [line for line in tex.splitlines() if line.endswith(r"\\")]


def width(line: str) -> int:
    """Columns that a line of a table takes."""
    cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
    spans = [re.search(r"\\multicolumn\{(\d+)\}", text) for text in cells]
    return sum(1 if span is None else int(span[1]) for span in spans)


@pytest.mark.parametrize("name", ["jpeg", "a_b & 100 % {mine} \\today $1^2~"])
def test_every_line_of_latex_is_as_wide_as_the_table_and_every_brace_is_closed(tmp_path: Path, name: str) -> None:
    lines = [cell(attack, defense, 9) for attack in [*PAPER_ATTACKS, "own_1"] for defense in ("none", "paper")]
    lines += [cell("own_1", name, 4), *(cell(attack, "nrp", None) for attack in PAPER_ATTACKS)]
    for file in ("table1.tex", "table2.tex"):
        tex = written(tmp_path, lines, name=file)
        assert {width(line) for line in body(tex)} == {1 + 16 + 1}
        assert re.search(r"\\begin\{tabular\}\{lr{17}\}", tex)
        assert escape_latex(name) in tex
        bare = re.sub(r"\\[\\{}]", "", tex)
        assert bare.count("{") == bare.count("}")
        assert re.findall(r"\\begin\{(\w+\*?)\}", tex) == ["table*", "tabular"]
        assert re.findall(r"\\end\{(\w+\*?)\}", tex) == ["tabular", "table*"]
        outside = re.sub(r"\\.|%.*\n", "", tex)
        assert not re.search(r"[$#^~]", outside.replace("\\", ""))


def test_latex_holds_figures_intervals_and_the_papers(tmp_path: Path) -> None:
    lines = [cell("clean", "paper", 24), cell("pgd_4", "paper", 16, ssim=0.75), cell("clean", "nrp", None)]
    assert body(written(tmp_path, lines, name="table1.tex")) == [
        r" & Clean & PGD & Mean \\",
        r"Defence &  & 4 & of 2 \\",
        r"paper & 75.0 & 50.0 & 62.5 \\",
        r" & (58--87) & (34--66) &  \\",
        r"Ding et al.: Proposed & 85.6 & 86.9 & 86.2 \\",
        r"difference & -10.6 & -36.9 & -23.8 \\",
        r"nrp: weights not supplied & -- & -- & -- \\",
        r"Ding et al.: NRP & 90.9 & 35.1 & 63.0 \\",
    ]
    assert r"paper & 0.900 & 0.750 & 0.825 \\" in body(written(tmp_path, name="table2.tex"))


def test_a_latex_caption_says_what_the_means_of_latex_are_over(tmp_path: Path) -> None:
    tex = written(tmp_path, [cell("clean", "paper", 24), cell("own", "paper", 8)], name="table1.tex")
    assert body(tex)[2:] == [
        r"paper & 75.0 & 25.0 & 50.0 \\",
        r" & (58--87) & (13--42) &  \\",
        r"Ding et al.: Proposed & 85.6 & -- & 85.6 (1 of 2) \\",
        r"difference & -10.6 & -- & -10.6 (1 of 2) \\",
    ]
    assert "The mean is over the 2 attacks of this run. In brackets" in tex
    both = "Means are over the attacks that have figures of both"
    assert both not in tex
    assert both in (tmp_path / "table1.md").read_text()


def test_attacks_stand_once_over_their_columns(tmp_path: Path) -> None:
    lines = [cell(attack, "none", 9) for attack in PAPER_ATTACKS]
    heads = body(written(tmp_path, lines, name="table2.tex"))[0]
    linf = " & ".join(rf"\multicolumn{{3}}{{c}}{{{name}}}" for name in ("FGSM", "PGD", "BIM", "MIFGSM"))
    assert heads == rf" & Clean & {linf} & C\&W & DDN & Mean \\"


def test_two_victims_are_two_latex_tables_of_different_names(tmp_path: Path) -> None:
    tex = written(tmp_path, [cell("cw", "none", 9), cell("cw", "none", 9, seed=1)], name="table1.tex")
    assert re.findall(r"\\label\{(.*)\}", tex) == ["tab:dipguard-accuracy", "tab:dipguard-accuracy-2"]
