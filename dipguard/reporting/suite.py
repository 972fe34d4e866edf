"""The attack suite as a page and a figure: accuracy of each defence under each attack, costs, and masking checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dipguard.evaluation.cell import CLEAN, DONE, WORST
from dipguard.files import write_json, write_text
from dipguard.reporting.canvas import DPI, line_style, plain_axes, save_figure, short
from dipguard.reporting.escape import NONE, escape_markdown
from dipguard.reporting.results import images_text, in_suite, interval_text
from dipguard.reporting.tables import in_short, markdown

WIDTH, ATTACK_HEIGHT, MARGIN = 8.0, 0.42, 1.6
"""Inches: the figure's width, the height of an attack, and title with legend."""
TITLES = {
    "worst": "Right in all of {} draws",
    "vote": "Right by the majority of {} draws",
    "known": "Right in the first draw, which is known to attacks whose draws are fixed",
}
"""Of the tables of the figures beside the mean over the draws."""
SPREAD = 0.6
"""Share of an attack's height over which its defences are spread."""
COSTS = {
    "attack": ["dip_steps", "victim_queries", "attack_seconds"],
    "judge": ["judge_dip_steps", "judge_queries", "judge_seconds"],
}


def suite_rows(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the suite: one for each attack and defence, the worst case last; empty without a worst case.

    The clean images belong to it too. Of an attack with several budgets it has the rows with the largest budget, at the
    worst case's eps if there is one. The column ``title`` has the attack's number and label, and whether it is a check.
    """
    worst = results[results["attack"] == WORST]
    rows = results[in_suite(results) | (results["attack"] == CLEAN)] if len(worst) else worst
    at_eps = rows["eps_255"].isin(worst["eps_255"]) & (rows["check"] == "")
    rows = rows.assign(at=at_eps, last=rows["attack"] == WORST).sort_values(["at", "budget"], na_position="first")
    rows = rows.drop_duplicates(["attack", "defense"], keep="last").sort_index()
    kind = rows["check"].map({"": "", "control": " (control)"}).fillna(" (check)")
    title = (rows["number"] + " " + rows["attack"]).str.strip().str.replace("_", " ") + kind
    return rows.assign(title=title).sort_values("last", kind="stable").drop(columns=["at", "last"])


def write_suite(folder: str | Path, rows: pd.DataFrame, checks: pd.DataFrame) -> list[Path]:
    """Write suite.md, suite.png and robustbench.json, from `suite_rows` and `read_checks`; returns the first two."""
    page = write_text(Path(folder) / "suite.md", suite_page(rows, checks))
    write_json(page.with_name("robustbench.json"), robustbench_records(rows, checks))
    return [page, save_figure(draw_suite(rows), page.with_suffix(".png"))]


def suite_page(rows: pd.DataFrame, checks: pd.DataFrame) -> str:
    """The whole page as Markdown."""
    parts = ["# The attack suite: accuracy under attack, %", escape_markdown(_head(rows)), _accuracies(rows)]
    for by, title in TITLES.items() if "judge" in rows else ():
        head = title.format(f"{rows['judge'].max():g}")
        parts += [f"## {head}, %", _accuracies(rows, by, f"{by}_low", f"{by}_high")]
    parts.append("\n".join(f"- {escape_markdown(text)}" for text in _reasons(rows)))
    parts += ["## Masking checks", _verdicts(checks)]
    for defense, found in checks.groupby("defense", sort=False):
        lines = [f"- {c.check}: **{c.verdict}**. {escape_markdown(c.figures)}" for c in found.itertuples()]
        parts.append("\n".join([f"{escape_markdown(defense)}:", "", *lines]))
    parts += ["## What it cost", "DIP steps / purified images read / seconds, as counted.", _cost_table(rows)]
    parts += ["Judging the images:", _cost_table(rows, "judge")] if "judge" in rows else []
    parts += ["## Settings of attackers and defenders, and what was cut", _settings(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def robustbench_records(rows: pd.DataFrame, checks: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """For each defence the figures in the form of RobustBench's model_info files: text, accuracies in %.

    ``autoattack_acc`` is that under AutoAttack's version for random defences, ``external`` and ``reported`` are the
    worst case, and a warning of the checks makes it ``unreliable``, as does an attack that failed or was not run. An
    accuracy that is missing is None. The footnote says what was cut of each attack.
    """
    (eps,) = set(rows[rows["attack"] == WORST]["eps_255"])
    figures = {"clean_acc": ("attack", CLEAN), "autoattack_acc": ("attack_name", "defended_autoattack")}
    figures |= dict.fromkeys(("external", "reported"), ("attack", WORST))
    made = {}
    for defense, cells in rows.groupby("defense", sort=False):
        done, first = cells[cells["status"] == DONE], cells.iloc[0]
        draws = cells["judge"].max() if "judge" in cells else 1  # NaN or 1 for a defence without any
        cuts = [f"{attack}: {cut}" for attack, cut in zip(done["attack"], done["cut"], strict=True) if cut]
        lacking = [note for note in cells[cells["attack"] == WORST]["note"] if "without" in note]
        more, warned = [*(f"worst case {note}" for note in lacking), *cuts], checks["verdict"] == "WARNING"
        warned = warned[checks["defense"] == defense]
        found = {name: [f"{100 * share:.2f}" for share in done[done[key] == value]["accuracy"]]
                 for name, (key, value) in figures.items()}  # fmt: skip
        made[str(defense)] = {
            "dataset": first["data"],
            "threat_model": "Linf",
            "eps": f"{eps:g}/255",
            "architecture": f"{first['victim']}, defence {first['defense_name']}",
            **{name: shares[0] if shares else None for name, shares in found.items()},
            "unreliable": bool(warned.any() or lacking),
            "footnote": "; ".join([_measured_on(cells), *([f"mean over {draws:g} draws"] if draws > 1 else []), *more]),
        }
    return made


def suite_text(rows: pd.DataFrame, checks: pd.DataFrame) -> str:
    """Accuracies and verdicts alone, for a terminal."""
    return "\n\n".join([_head(rows), _accuracies(rows), _verdicts(checks)])


def draw_suite(rows: pd.DataFrame) -> Figure:
    """Accuracy (to the right) of each defence under each attack (downwards), with 95 % Wilson intervals.

    Where images were judged by several draws: the mean, and as open markers the images that are right in all of them.
    """
    attacks, defenses = list(dict.fromkeys(rows["attack"])), list(dict.fromkeys(rows["defense"]))
    height = ATTACK_HEIGHT * len(attacks) * max(1.0, len(defenses) / 5) + MARGIN
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for number, defense in enumerate(defenses):
        cells = rows[(rows["defense"] == defense) & (rows["status"] == DONE)]
        offset = SPREAD * (number / (len(defenses) - 1) - 0.5) if len(defenses) > 1 else 0.0
        y = [attacks.index(attack) + offset for attack in cells["attack"]]
        style = line_style(number) | {"linestyle": "none"}
        ax.hlines(y, 100 * cells["low"], 100 * cells["high"], color=style["color"], linewidth=3, alpha=0.22)
        ax.plot(100 * cells["accuracy"], y, markersize=5.5, label=short(defense, 20), **style)
        if "judge" in rows:
            ax.plot(100 * cells["worst"], y, markersize=5.5, markerfacecolor="none", **style)
    titles = dict(zip(rows["attack"], rows["title"], strict=True))
    ax.set_yticks(range(len(attacks)), [short(titles[attack], 32) for attack in attacks], fontsize=9)
    ax.set(xlim=(-2, 102), ylim=(len(attacks) - 0.5, -0.5), xlabel="accuracy, %")
    ax.hlines([line - 0.5 for line in range(1, len(attacks))], -2, 102, color="#dddddd", linewidth=0.7)
    plain_axes(ax, grid="x")
    figure.legend(loc="outside upper center", ncols=min(len(defenses), 6), frameon=False, fontsize=9)
    marks = f"; open: right in all of {rows['judge'].max():g} draws" if "judge" in rows else ""
    figure.supxlabel(f"{_measured_on(rows)}; bars: 95 % Wilson intervals{marks}", fontsize=9)
    return figure


def _measured_on(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['data']}, victim {first['victim']}; {images_text(rows['n'])}"


def _head(rows: pd.DataFrame) -> str:
    eps = rows[rows["attack"] == WORST]["eps_255"].iloc[0]
    draws = "the evaluation's own draws"
    if "judge" in rows:
        draws = (
            f"{rows['judge'].max():g} draws of a random defence (the control and the large eps: one), "
            "the evaluation's own first; the figure is the mean"
        )
    return (
        f"{_measured_on(rows)}; L-inf eps {eps:g}/255, untargeted, white box. In brackets: 95 % intervals (Wilson). "
        f"Every attacked image is classified once more with {draws}. The worst case is taken for "
        "each image over all attacks and the clean image; the control and the large eps are not part of it."
    )


def _table(rows: pd.DataFrame, texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table of attacks by defences; ``texts`` are those of the rows."""
    wide = rows.assign(text=list(texts)).pivot(index="title", columns="defense", values="text").fillna(NONE)
    victims = rows.drop_duplicates("defense").set_index("defense")["victim"]
    heads = [d if victim == victims.iloc[0] else f"{d}: {victim}" for d, victim in victims.items()]
    wide = wide.reindex(index=rows["title"].unique(), columns=victims.index)
    return ["attack", *heads], [[title, *line] for title, line in wide.T.items()]


def _accuracies(rows: pd.DataFrame, *columns: str) -> str:
    figures = zip(rows["status"], rows[list(columns or ("accuracy", "low", "high"))].to_numpy(), strict=True)
    texts = [interval_text(*ends) if status == DONE else _brief(status) for status, ends in figures]
    return markdown(*_table(rows, texts))


def _brief(status: str) -> str:
    return in_short(status.split(":")[0], 30)


def _reasons(rows: pd.DataFrame) -> Iterator[str]:
    """Why figures are missing, if the table has no room for it."""
    long = rows[rows["status"] != rows["status"].map(_brief)]
    for (defense, status), cells in long.groupby(["defense", "status"], sort=False):
        yield f"{defense}: {status}" if len(cells) > 1 else f"{cells.iloc[0]['title']}, {defense}: {status}"
    for line in rows[(rows["attack"] == WORST) & rows["note"].str.contains("without")].itertuples():
        yield f"{line.title}, {line.defense}: {line.note}, which failed or were not run"


def _verdicts(checks: pd.DataFrame) -> str:
    if not len(checks):
        return "No attack was run yet."
    wide = checks.pivot(index="check", columns="defense", values="verdict").fillna(NONE)
    wide = wide.reindex(index=checks["check"].unique(), columns=checks["defense"].unique())
    return markdown(["check", *wide.columns], [[name, *line] for name, line in wide.T.items()])


def _cost_table(rows: pd.DataFrame, of: str = "attack") -> str:
    attacks = rows[~rows["attack"].isin((CLEAN, WORST) if of == "attack" else (WORST,))]
    counted = attacks[COSTS[of]].where(attacks["status"] == DONE)
    head, lines = _table(attacks, [_cost(line) for line in counted.to_numpy()])
    counted = counted[~attacks.duplicated(["defense", "key"])]  # attacks that are the same are made, and judged, once
    sums = counted.groupby(attacks["defense"], sort=False).sum()
    return markdown(head, [*lines, ["sum", *(_cost(line) for line in sums.to_numpy())]])


def _cost(costs: Sequence[float]) -> str:
    return NONE if costs[0] != costs[0] else "{:,.0f} / {:,.0f} / {:,.0f} s".format(*costs)


def _settings(rows: pd.DataFrame) -> str:
    """A line for each attack and each defence: its options, and what they lack of an uncut run."""
    lines = []
    for title, cells in rows[~rows["attack"].isin((CLEAN, WORST))].groupby("title", sort=False):
        # What was cut may differ between defences (a deterministic one has no draws): the longest text is shown.
        done = cells[cells["status"] == DONE]
        shown = max((done if len(done) else cells).itertuples(), key=lambda cell: len(cell.cut))
        eps = "" if shown.eps_255 != shown.eps_255 else f"eps {shown.eps_255:g}/255"
        options = ", ".join(filter(None, (eps, shown.options)))
        lines.append([title, shown.attack_name, options, shown.cut or NONE, NONE])
    for line in rows[rows["attack"] == CLEAN].itertuples():
        judged = "judge" in rows and line.status == DONE
        draws = f"judged by {line.judge:g} draw{'s' * (line.judge != 1)}" if judged else NONE
        options = getattr(line, "defense_options", "") or NONE
        lines.append([f"defence {line.defense}", line.defense_name, options, line.cut or NONE, draws])
    return markdown(["attack or defence", "name", "options", "cut to", "note"], lines, words=True)
