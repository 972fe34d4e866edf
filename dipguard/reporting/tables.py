"""Tables 1 and 2: accuracy and SSIM, defences by attacks, as Markdown, CSV and LaTeX, with the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tabulate import tabulate

from dipguard.evaluation.cell import DONE
from dipguard.files import write_text
from dipguard.reporting import paper_figures as published
from dipguard.reporting.canvas import short
from dipguard.reporting.escape import NONE, escape_latex, escape_markdown
from dipguard.reporting.paper_figures import ATTACKS, DEFENSES, head_of
from dipguard.reporting.results import images_text


class Measure(NamedTuple):
    """What a table shows: its number in the paper, the column of results.csv, and how figures are printed."""

    number: int
    title: str
    field: str
    scale: float
    digits: int
    paper: Mapping[str, Mapping[str, Mapping[str, float]]]


MEASURES = (
    Measure(1, "accuracy, %", "accuracy", 100.0, 1, published.TABLE_1),
    Measure(2, "SSIM to the clean image", "ssim", 1.0, 3, published.TABLE_2),
)


def write_tables(folder: str | Path, results: pd.DataFrame) -> list[Path]:
    """Write table1 (accuracy) and table2 (SSIM), each as .md and .tex; returns the four paths.

    ``results`` are rows of `read_results`, at most one for a data set, victim, surrogate, seed, attack and defence.
    """
    paths = []
    for measure in MEASURES:
        tables, name = _split(results, measure), f"table{measure.number}"
        page = "\n\n".join([f"# Table {measure.number}: {measure.title}", *(table.page() for table in tables)])
        latex = "\n".join(table.latex(number) for number, table in enumerate(tables))
        paths.append(write_text(Path(folder) / f"{name}.md", page + "\n"))
        paths.append(write_text(Path(folder) / f"{name}.tex", f"% Needs \\usepackage{{booktabs}}.\n\n{latex}"))
    return paths


def tables_text(results: pd.DataFrame) -> str:
    """Our own figures alone, both tables, for a terminal."""
    tables = [table for measure in MEASURES for table in _split(results, measure)]
    return "\n\n".join(f"Table {table.measure.number}: {table.title}\n\n{table.section()}" for table in tables)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A Markdown table of text: the first column to the left, the others to the right, or ``words`` to the left too."""
    names, *lines = [[escape_markdown(text) for text in row] for row in (head, *rows)]
    align = ("left", *["left" if words else "right"] * (len(head) - 1))
    return str(tabulate(lines, names, tablefmt="pipe", disable_numparse=True, colalign=align))


def in_short(status: str, most: int = 40) -> str:
    """The first sentence of a status, to stand in a table."""
    return short(" ".join(status.split()).split(". ")[0], most)


def _split(results: pd.DataFrame, measure: Measure) -> list[_Table]:
    """A table for each data set, victim, surrogate and seed, in the order of the results."""
    groups = results.groupby(["data", "victim", "surrogate", "seed"], sort=False)
    return [_Table(cells, measure) for _, cells in groups]


class _Table:
    """The cells of one data set, victim, surrogate and seed, shown by one measure.

    ``figures`` has a row for each defence and kind of figure, and a column for each attack. ``paper`` has the paper's
    rows by our labels, ``shared`` our attacks that it has too: if it has the data set, the defence and the very attack,
    without a surrogate.
    """

    def __init__(self, cells: pd.DataFrame, measure: Measure) -> None:
        self.cells, self.measure, first = cells, measure, cells.iloc[0]
        labels = list(dict.fromkeys(cells["attack"]))
        self.attacks = [a for a in ATTACKS if a in labels] + [a for a in labels if a not in ATTACKS]
        self.names = dict(zip(cells["defense"], cells["defense_name"], strict=True))
        surrogate = f", surrogate {first['surrogate']}" if first["surrogate"] else ""
        self.title = f"{first['data']}, victim {first['victim']}{surrogate}, seed {first['seed']:.0f}"
        known = {row.attack: (row.attack_name, row.eps_255) for row in cells.fillna({"eps_255": -1}).itertuples()}
        same = [a for a in self.attacks if a in ATTACKS and known[a] == (ATTACKS[a].name, ATTACKS[a].eps_255 or -1)]
        self.data = None if surrogate or not same else published.paper_data(first["data"], first["victim"])
        found = measure.paper.get(self.data or "", {})
        self.paper = {d: DEFENSES[name] for d, name in self.names.items() if DEFENSES.get(name) in found}
        self.shared = same if self.paper else []

        done = cells[cells["status"] == DONE]
        fields = {"ours": measure.field} | ({"low": "low", "high": "high"} if measure.number == 1 else {})
        parts = {
            kind: measure.scale * done.pivot(index="defense", columns="attack", values=field)
            for kind, field in fields.items()
        }
        if self.paper:
            printed = pd.DataFrame({defense: found[name] for defense, name in self.paper.items()}).T[self.shared]
            parts |= {"paper": printed, "difference": parts["ours"] - printed}
        rows = pd.MultiIndex.from_tuples(product(self.names, parts), names=["defense", "figure"])
        self.figures = pd.concat(parts).swaplevel().reindex(index=rows, columns=self.attacks)
        status = cells.pivot(index="defense", columns="attack", values="status").fillna("")
        self.status = status.reindex(index=list(self.names), columns=self.attacks)

    def text(self, value: float, kind: str = "ours") -> str:
        rounded = round(float(value), self.measure.digits) + 0.0  # no "-0.0"
        return NONE if value != value else f"{rounded:{'+' if kind == 'difference' else ''}.{self.measure.digits}f}"

    def texts(self, defense: str, kind: str, attacks: Sequence[str]) -> list[str]:
        """The figures of a defence and their mean; the paper's is over those that we have too, if there are any."""
        values, ours = (self.figures.loc[(defense, k)][list(attacks)] for k in (kind, "ours"))
        both = values[ours.notna()].dropna()
        over = both if kind == "paper" and len(both) else values.dropna()
        of = "" if len(over) in (0, len(attacks)) else f" ({len(over)} of {len(attacks)})"
        return [*(self.text(value, kind) for value in values), self.text(over.mean(), kind) + of]

    def intervals(self, defense: str) -> list[str]:
        """The 95 % intervals of a defence; empty without any."""
        if self.measure.number != 1 or self.figures.loc[(defense, "low")].isna().all():
            return []
        ends = zip(self.figures.loc[(defense, "low")], self.figures.loc[(defense, "high")], strict=True)
        return ["" if low != low else f"{low:.0f}{NONE}{high:.0f}" for low, high in ends]

    def compared(self, defense: str, attacks: Sequence[str]) -> list[list[str]]:
        """Our figures, the paper's and the difference, if there is one; nothing without the paper's."""
        if defense not in self.paper:
            return []
        names = {"ours": defense, "paper": f"Ding et al.: {self.paper[defense]}", "difference": "difference"}
        kinds = [kind for kind in names if kind != "difference" or self.figures.loc[(defense, kind)].notna().any()]
        return [[names[kind], *self.texts(defense, kind, attacks)] for kind in kinds]

    def label(self, defense: str) -> str:
        """A defence's label, and the reason if it has no figures for one and the same reason."""
        reasons = set(self.status.loc[defense]) - {""}
        return defense if len(reasons) != 1 or DONE in reasons else f"{defense}: {in_short(reasons.pop())}"

    def gaps(self) -> list[str]:
        """Why figures are missing: a sentence for each defence and reason."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for defense, attack in product(self.names, self.attacks):
            if pd.isna(self.figures.loc[(defense, "ours"), attack]):
                status = self.status.loc[defense, attack]
                why = {"": "not run yet", DONE: f"no {self.measure.field.upper()} stored"}.get(status, status)
                reasons.setdefault((defense, why), []).append(head_of(attack))
        where = {key: "" if len(a) == len(self.attacks) else f" {', '.join(a)}:" for key, a in reasons.items()}
        return [f"{defense}:{where[defense, why]} {why}" for defense, why in reasons]

    def describe(self) -> str:
        """What the table shows, of how many images, and what its mean is over."""
        counts = self.cells["n"][self.cells["status"] == DONE]
        images = f"{images_text(counts)} a cell." if len(counts) else "No cell has figures yet."
        mean = f"The mean is over the {len(self.attacks)} attacks of this run."
        if set(self.attacks) == set(ATTACKS):
            mean = "The mean is over all 15 columns of the paper, Clean included."
        title = self.measure.title[0].upper() + self.measure.title[1:]
        return f"{title}. {images} {mean}"

    def note(self) -> str:
        """What our figures and the paper's have in common and what not."""
        first, (victim, described) = self.cells.iloc[0], published.VICTIMS[str(self.data)]
        other = "other images" if first["victim"] == victim else "another victim and other images"
        return (
            f"The paper's figures ({published.SOURCE}, Table {self.measure.number}, {self.data}) were measured on "
            f"{described}; ours on {first['data']} with {first['victim']}: {other}, and settings of the defences and "
            "attacks that may differ too. A difference is ours minus the paper's."
        )

    def section(self) -> str:
        """The main table in Markdown, with what it shows above and the reasons for missing figures below."""
        rows = []
        for defense in self.names:
            *texts, mean = self.texts(defense, "ours", self.attacks)
            ran = self.status.loc[defense] != ""
            rows.append([self.label(defense), *(text * run for text, run in zip(texts, ran, strict=True)), mean])
        table = markdown(["defence", *map(head_of, self.attacks), f"mean of {len(self.attacks)}"], rows)
        return "\n\n".join(
            filter(None, [self.describe(), table, "\n".join(f"- {escape_markdown(g)}" for g in self.gaps())])
        )

    def page(self) -> str:
        """The main table, the intervals, and the comparison with the paper, in Markdown."""
        parts = [f"## {escape_markdown(self.title)}", self.section()]
        if rows := [[defense, *texts] for defense in self.names if (texts := self.intervals(defense))]:
            parts += ["### 95 % intervals (Wilson), %", markdown(["defence", *map(head_of, self.attacks)], rows)]
        if self.paper:
            head = ["", *map(head_of, self.shared), f"mean of {len(self.shared)}"]
            rows = [row for defense in self.paper for row in self.compared(defense, self.shared)]
            note = f"{self.note()} Means are over the attacks that have figures of both, if there are any."
            parts += ["### Compared with the paper", escape_markdown(note), markdown(head, rows)]
        return "\n\n".join(parts)

    def latex(self, number: int) -> str:
        """The figures, 95 % intervals and the comparison with the paper as a LaTeX ``table*``."""
        rows: list[list[str]] = []
        for defense in self.names:
            rows.append([self.label(defense), *self.texts(defense, "ours", self.attacks)])
            if intervals := self.intervals(defense):
                rows.append(["", *(text and f"({text})" for text in intervals), ""])
            rows += self.compared(defense, self.attacks)[1:]
        heads = [(ATTACKS[a].family, f"{ATTACKS[a].eps_255 or ''}") if a in ATTACKS else (a, "") for a in self.attacks]
        columns = pd.MultiIndex.from_tuples([("", "Defence"), *heads, ("Mean", f"of {len(self.attacks)}")])
        style = pd.DataFrame(rows, columns=columns).style.hide(axis="index")
        style = style.format(escape_latex).format_index(escape_latex, axis="columns")
        brackets = "In brackets: 95 % Wilson intervals." if self.measure.number == 1 else ""
        notes = [f"{self.title}.", self.describe(), brackets, self.note() if self.paper else ""]
        notes += [f"{gap.rstrip('.')}." for gap in self.gaps()]
        return str(
            style.set_table_styles([{"selector": "scriptsize", "props": ":;"}]).to_latex(
                environment="table*",
                position_float="centering",
                column_format="l" + "r" * (len(columns) - 1),
                hrules=True,
                multicol_align="c",
                label=f"tab:dipguard-{self.measure.field}" + (f"-{number + 1}" if number else ""),
                caption=escape_latex(" ".join(filter(None, notes))),
            )
        )
