"""The attack suite's page and picture, from files as a run stores them."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest

from dipguard.evaluation.results import CHECK_FIELDS, FIELDS
from dipguard.reporting import suite
from dipguard.reporting.canvas import DPI
from dipguard.reporting.results import read_checks, read_results
from dipguard.reporting.suite import ATTACK_HEIGHT, MARGIN, WIDTH, draw_suite, suite_rows, suite_text
from tests.reporting import stored_run
from tests.reporting.stored_run import NO_WEIGHTS, write_lines, write_results

COST = {"purifications": 160, "dip_steps": 320_000, "victim_queries": 160, "gradients": 144, "attack_seconds": 161.4}


def cell(attack: str, defense: str, correct: int | None, **changes: Any) -> dict[str, Any]:
    line = stored_run.cell(attack, defense, correct, n=16)
    if correct is None:
        line |= {"n": "", "status": "deterministic"}
    eps = {} if attack == "clean" else {"eps_255": 8}
    return {**line, "attack_name": "x", "key": f"{attack} x {defense}", **eps, **changes}


LINES = [
    cell("clean", "none", 15),
    cell("identity", "none", 0, number="2", **COST | {"dip_steps": 0}),
    cell("identity_eot", "none", None, number="4a"),
    cell("noise", "none", 14, check="control", **dict.fromkeys(COST, 0)),
    cell("large_eps", "none", 0, check="large_eps", eps_255=64, **COST | {"dip_steps": 0}),
    cell("worst_case", "none", 0, number="9"),
    cell("clean", "mirror", 13, cut="400 of 2,000 DIP steps an image"),
    cell("identity", "mirror", 9, number="2", options="steps 10, draws fixed", cut="steps 10 of 100", **COST),
    cell("identity_eot", "mirror", None, number="4a", status="failed: RuntimeError: out | of <luck>"),
    cell("noise", "mirror", 12, check="control", **dict.fromkeys(COST, 0)),
    cell("large_eps", "mirror", 1, check="large_eps", eps_255=64, **COST),
    cell("worst_case", "mirror", 9, number="9"),
    cell("clean", "baseline", 10, victim="cifar_cnn_a", defense_name="none"),
    cell("worst_case", "baseline", 4, victim="cifar_cnn_a", defense_name="none", number="9"),
]
CHECKS = [
    dict(zip(CHECK_FIELDS, (defense, "a large eps reaches 0 %", verdict, f"{n} of 16 right at 64/255"), strict=True))
    for defense, verdict, n in (("none", "ok", 0), ("mirror", "WARNING", 1))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_results(tmp_path, LINES)
    write_lines(tmp_path / "checks.csv", CHECK_FIELDS, CHECKS)
    return tmp_path


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return suite_rows(read_results(folder / "results.csv")), read_checks(folder / "checks.csv")


def page_of(folder: Path) -> str:
    page, picture = suite.write_suite(folder, *read(folder))
    assert (page.name, picture.name) == ("suite.md", "suite.png")
    return page.read_text(encoding="utf-8")


def rows_after(text: str, heading: str) -> dict[str, list[str]]:
    """The first table after a heading, by its first column."""
    table = [line for line in text.split(heading, 1)[1].split("\n\n## ")[0].splitlines() if line.startswith("|")]
    parsed = [[part.strip() for part in line.replace("\\|", "!").strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in parsed}


def test_accuracies_have_their_intervals_and_gaps_their_reason(folder: Path) -> None:
    text = page_of(folder)
    table = rows_after(text, "# The attack suite")
    assert table["attack"] == ["none", "mirror", "baseline: cifar_cnn_a"]
    assert table["clean"] == ["93.8 (72–99)", "81.2 (57–93)", "62.5 (39–82)"]
    assert table["2 identity"] == ["0.0 (0–19)", "56.2 (33–77)", "–"]
    assert table["4a identity eot"] == ["deterministic", "failed", "–"]
    assert table["noise (control)"][1] == "75.0 (51–90)"
    assert table["9 worst case"] == ["0.0 (0–19)", "56.2 (33–77)", "25.0 (10–49)"]
    assert list(table)[-1] == "9 worst case"
    assert "- 4a identity eot, mirror: failed: RuntimeError: out \\| of &lt;luck>" in text


def test_costs_cuts_and_checks_are_told(folder: Path) -> None:
    text = page_of(folder)
    costs = rows_after(text, "## What it cost")
    assert costs["2 identity"][:2] == ["0 / 160 / 161 s", "320,000 / 160 / 161 s"]
    assert costs["sum"][1] == "640,000 / 320 / 323 s"
    assert "clean" not in costs
    write_results(folder, [*LINES, cell("from_mirror", "mirror", 9, number="1b", key="identity x mirror", **COST)])
    costs = rows_after(page_of(folder), "## What it cost")
    assert (costs["1b from mirror"][1], costs["sum"][1]) == ("320,000 / 160 / 161 s", "640,000 / 320 / 323 s")
    settings = rows_after(text, "## Settings of attackers and defenders, and what was cut")
    assert settings["2 identity"] == ["x", "eps 8/255, steps 10, draws fixed", "steps 10 of 100", "–"]
    assert settings["large eps (check)"][1] == "eps 64/255"
    assert settings["defence mirror"] == ["mirror", "–", "400 of 2,000 DIP steps an image", "–"]
    assert rows_after(text, "## Masking checks")["a large eps reaches 0 %"] == ["ok", "WARNING"]
    assert "- a large eps reaches 0 %: **WARNING**. 1 of 16 right at 64/255" in text
    assert "WARNING" in suite_text(*read(folder))
    assert "What it cost" not in suite_text(*read(folder))


def test_an_attack_with_several_budgets_counts_by_its_largest_at_the_suites_eps(tmp_path: Path) -> None:
    lines = [
        stored_run.point("hopskipjump", "none", eps, budget, 1, number="8") for budget in (9, 5) for eps in (4, 8, 12)
    ]
    write_results(tmp_path, [*lines, cell("worst_case", "none", 0)])
    rows = suite_rows(read_results(tmp_path / "results.csv"))
    assert rows[["attack", "eps_255", "budget"]].to_numpy().tolist()[0] == ["hopskipjump", 8, 9]
    assert len(rows) == 2


def test_a_missing_defence_is_told(tmp_path: Path) -> None:
    missing = {"n": "", "status": NO_WEIGHTS}
    lines = [cell("clean", "nrp", None, **missing), cell("blur", "nrp", None, number="1", **missing)]
    write_results(tmp_path, [*lines, cell("worst_case", "none", 0)])
    text = suite.suite_page(suite_rows(read_results(tmp_path / "results.csv")), pd.DataFrame(columns=CHECK_FIELDS))
    assert f"- nrp: {NO_WEIGHTS}" in text
    assert rows_after(text, "# The attack suite")["clean"] == ["weights not supplied", "–"]
    assert "No attack was run yet." in text


def test_nothing_is_no_suite(tmp_path: Path) -> None:
    rows = suite_rows(read_results(write_results(tmp_path, LINES[:3])))
    assert len(rows) == 0


def test_the_picture_shows_each_defence_where_it_stands(folder: Path) -> None:
    rows, checks = read(folder)
    figure = draw_suite(rows)
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines() if line.get_marker() not in ("None", "")}
    assert set(lines) == {"none", "mirror", "baseline"}
    assert list(lines["none"].get_xdata()) == pytest.approx([93.75, 0, 87.5, 0, 0])
    assert [round(y) for y in lines["none"].get_ydata()] == [0, 1, 3, 4, 5]  # a gap where there is no figure
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "clean", "2 identity", "4a identity eot", "noise (control)", "large eps (check)", "9 worst case",
    ]  # fmt: skip
    bars = ax.collections[0].get_segments()
    assert [list(bar[:, 0]) for bar in bars][1] == pytest.approx([0, 100 * float(LINES[1]["high"])])
    picture = matplotlib.image.imread(suite.write_suite(folder, rows, checks)[1])
    assert picture.shape[:2] == (round((6 * ATTACK_HEIGHT + MARGIN) * DPI), round(WIDTH * DPI))
    assert (picture[..., :3] < 0.95).any(axis=2).mean() > 0.03


JUDGE = {
    "judge": 10, "worst": 0.25, "worst_low": 0.1, "worst_high": 0.5, "vote": 0.625, "vote_low": 0.39, "vote_high": 0.82,
    "known": 0.5, "known_low": 0.28, "known_high": 0.72,
    "judge_dip_steps": 120_000, "judge_queries": 160, "judge_seconds": 40.4, "defense_options": "T 250, t0 40",
}  # fmt: skip


def judged(folder: Path) -> Path:
    lines = [line | (JUDGE if line["status"] == "done" else {}) for line in LINES]
    lines[7] |= {"correct": 9.6, "accuracy": 0.6}
    write_lines(folder / "results.csv", (*FIELDS, *JUDGE), lines)
    write_lines(folder / "checks.csv", CHECK_FIELDS, CHECKS)
    return folder


def test_figures_over_several_draws_stand_beside_each_other(tmp_path: Path) -> None:
    text = page_of(judged(tmp_path))
    assert rows_after(text, "# The attack suite")["2 identity"][1] == "60.0 (33–77)"
    assert rows_after(text, "## Right in all of 10 draws")["2 identity"][1] == "25.0 (10–50)"
    assert rows_after(text, "## Right by the majority of 10 draws")["9 worst case"][1] == "62.5 (39–82)"
    known = "## Right in the first draw, which is known to attacks whose draws are fixed"
    assert rows_after(text, known)["2 identity"][1] == "50.0 (28–72)"
    costs = rows_after(text, "Judging the images:")
    assert costs["clean"][1] == "120,000 / 160 / 40 s"
    assert costs["4a identity eot"] == ["–", "–", "–"]
    assert "with 10 draws of a random defence" in text
    settings = rows_after(text, "## Settings of attackers and defenders, and what was cut")
    assert settings["defence none"] == ["none", "T 250, t0 40", "–", "judged by 10 draws"]
    figure = draw_suite(read(tmp_path)[0])
    (ax,) = figure.axes
    open_marks = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in open_marks] == [[25.0] * 5, [25.0] * 5, [25.0] * 2]


def test_a_run_of_one_draw_has_none_of_it(folder: Path) -> None:
    text = page_of(folder)
    assert "draws, %" not in text
    assert "Judging" not in text


def test_a_damaged_figure_of_several_draws_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "results.csv", (*FIELDS, *JUDGE), [LINES[0] | JUDGE | {"judge": "many"}])
    with pytest.raises(ValueError, match="`judge` must hold numbers"):
        read_results(path)


def test_a_record_has_robustbenchs_form(tmp_path: Path) -> None:
    autoattack = cell("autoattack_rand", "mirror", 3, number="7a", attack_name="defended_autoattack")
    write_results(tmp_path, [*LINES, autoattack])
    write_lines(tmp_path / "checks.csv", CHECK_FIELDS, CHECKS)
    suite.write_suite(tmp_path, *read(tmp_path))
    records = json.loads((tmp_path / "robustbench.json").read_text(encoding="utf-8"))
    assert set(records) == {"none", "mirror", "baseline"}
    footnote = records["mirror"].pop("footnote")
    assert records["mirror"].pop("architecture") == "cifar10_resnet56, defence mirror"
    assert records["mirror"] == {
        "dataset": "cifar10", "threat_model": "Linf", "eps": "8/255", "clean_acc": "81.25", "autoattack_acc": "18.75",
        "external": "56.25", "reported": "56.25", "unreliable": True,
    }  # fmt: skip
    assert footnote.endswith("16 images; clean: 400 of 2,000 DIP steps an image; identity: steps 10 of 100")
    assert (records["none"]["autoattack_acc"], records["none"]["unreliable"]) == (None, False)


def test_a_worst_case_over_a_part_of_the_attacks_is_told(folder: Path) -> None:
    lacking = {"note": "over 1 attacks, without blur"}
    told = [line | (lacking if (line["attack"], line["defense"]) == ("worst_case", "none") else {}) for line in LINES]
    write_results(folder, told)
    suite.write_suite(folder, *read(folder))
    assert "- 9 worst case, none: over 1 attacks, without blur, which failed or were not run" in page_of(folder)
    record = json.loads((folder / "robustbench.json").read_text(encoding="utf-8"))["none"]
    assert record["unreliable"]
    assert "worst case over 1 attacks, without blur" in record["footnote"]


def test_a_records_footnote_is_about_its_own_victim_and_images(tmp_path: Path) -> None:
    write_results(tmp_path, [line | ({"n": 8} if line["defense"] == "baseline" else {}) for line in LINES])
    write_lines(tmp_path / "checks.csv", CHECK_FIELDS, CHECKS)
    suite.write_suite(tmp_path, *read(tmp_path))
    records = json.loads((tmp_path / "robustbench.json").read_text(encoding="utf-8"))
    assert records["none"]["footnote"] == "cifar10, victim cifar10_resnet56; 16 images"
    assert records["baseline"]["footnote"] == "cifar10, victim cifar_cnn_a; 8 images"


def test_a_record_names_draws_only_where_there_are_some(tmp_path: Path) -> None:
    lines = [line | JUDGE | ({"judge": 1} if line["defense"] == "none" else {}) for line in LINES]
    write_lines(tmp_path / "results.csv", (*FIELDS, *JUDGE), lines)
    write_lines(tmp_path / "checks.csv", CHECK_FIELDS, CHECKS)
    suite.write_suite(tmp_path, *read(tmp_path))
    records = json.loads((tmp_path / "robustbench.json").read_text(encoding="utf-8"))
    told = {defense: "mean over 10 draws" in record["footnote"] for defense, record in records.items()}
    assert told == {"none": False, "mirror": True, "baseline": True}
