"""Tables 1 and 2 of a matrix: Markdown, CSV and LaTeX, from results.csv alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from dipguard.files import write_text
from dipguard.reporting.beside_paper import Beside, beside_the_paper
from dipguard.reporting.latex import latex_table
from dipguard.reporting.matrix_lines import MEASURES, Grid, Line, Measure, in_short, split_grids
from dipguard.reporting.paper_figures import head_of
from dipguard.reporting.stored_results import ResultRow, read_results

NONE = "\N{EN DASH}"
"""Stands where a cell has no figure, for a reason that is given below the table."""


def write_tables(folder: str | Path) -> list[Path]:
    """Write table1 (accuracy) and table2 (SSIM), each as .md, .csv and .tex, from the folder's results.csv.

    Returns:
        The six paths.

    Raises:
        FileNotFoundError: No results.csv in the folder.
        ValueError: It is damaged, or holds no cell yet.
    """
    folder = Path(folder)
    results = read_results(folder / "results.csv")
    if not results:
        raise ValueError(f"{folder / 'results.csv'} holds no cell yet: there is nothing to put into a table")
    grids = split_grids(results)
    paths = []
    for measure in MEASURES:
        stem = f"table{measure.number}"
        paths += [
            write_text(folder / f"{stem}.md", markdown_page(grids, measure)),
            write_text(folder / f"{stem}.csv", csv_table(grids, measure)),
            write_text(folder / f"{stem}.tex", latex_table(grids, measure)),
        ]
    return paths


def main_tables(results: Sequence[ResultRow]) -> str:
    """The run's own figures alone, both tables, as text for a terminal."""
    grids = split_grids(results)
    parts = [f"Table {m.number}: {grid.title}\n\n{_section(grid, m)}" for m in MEASURES for grid in grids]
    return "\n\n".join(parts)


def markdown_page(grids: Sequence[Grid], measure: Measure) -> str:
    """A table as a page of Markdown: own figures, their intervals, and the paper's beside them."""
    parts = [f"# Table {measure.number}: {measure.title}"]
    for grid in grids:
        parts += [f"## {escaped(grid.title)}", _section(grid, measure)]
        intervals = _intervals(grid, measure) if measure.number == 1 else []
        if intervals:
            parts += ["### 95 % intervals (Wilson), %", aligned(["defence", *map(head_of, grid.columns)], intervals)]
        paper = beside_the_paper(grid, measure)
        if paper is not None:
            parts += ["### Beside the paper", escaped(paper.note(grid, measure)), _paper_table(grid, measure, paper)]
    return "\n\n".join(parts) + "\n"


def _section(grid: Grid, measure: Measure) -> str:
    """The main table of a grid, between what must be known to read it and why figures are missing."""
    rows = []
    for row in grid.rows:
        why = grid.why_empty(row)
        label = row if why is None else f"{row}: {in_short(why)}"
        line = grid.ours(row, measure)
        rows.append([label, *_cells(grid, row, line, measure), _mean(line, measure, len(grid.columns))])
    head = ["defence", *map(head_of, grid.columns), f"mean of {len(grid.columns)}"]
    notes = [f"- {escaped(f'{row}: {note}')}" for row, gaps in grid.legend(measure).items() for note in gaps]
    return "\n".join([grid.describe(measure), "", aligned(head, rows), *([""] if notes else []), *notes])


def _cells(grid: Grid, row: str, line: Line, measure: Measure) -> list[str]:
    """A text a column: the figure, `NONE` where the cell has none, empty where it was not run yet."""
    run = grid.of_row(row)
    empty = {column: NONE if column in run else "" for column in grid.columns}
    return [measure.text(line.values[c]) if c in line.values else empty[c] for c in grid.columns]


def _mean(line: Line, measure: Measure, columns: int, *, sign: bool = False) -> str:
    if line.mean is None:
        return NONE
    over = "" if len(line.averaged) == columns else f" ({len(line.averaged)} of {columns})"
    return measure.text(line.mean, sign=sign) + over


def _intervals(grid: Grid, measure: Measure) -> list[list[str]]:
    rows = []
    for row in grid.rows:
        low, high = (grid.field(row, name, scale=measure.scale).values for name in ("low", "high"))
        texts = [f"{low[c]:.0f}{NONE}{high[c]:.0f}" if c in low else "" for c in grid.columns]
        if low:
            rows.append([row, *texts])
    return rows


def _paper_table(grid: Grid, measure: Measure, paper: Beside) -> str:
    rows = []
    for row, given in paper.rows.items():
        names = {"ours": row, "paper": given.label, "difference": "difference"}
        for kind, line in paper.lines(grid, row, measure).items():
            sign = kind == "difference"
            if sign and not line.values:
                continue
            cells = [measure.text(line.values[c], sign=sign) if c in line.values else NONE for c in paper.columns]
            rows.append([names[kind], *cells, _mean(line, measure, len(paper.columns), sign=sign)])
    return aligned(["", *map(head_of, paper.columns), f"mean of {len(paper.columns)}"], rows)


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal: names to the left, figures to the right."""
    lines = [[escaped(text) for text in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def escaped(text: str) -> str:
    """Text that Markdown prints as it is, on one line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


FIXED = ("data", "victim", "judge", "seed", "row", "defense", "figure", "unit")


def csv_table(grids: Sequence[Grid], measure: Measure) -> str:
    """A table as CSV, several lines a row of the matrix.

    ``figure`` says what a line holds: ``ours``, ``n``, for the accuracy ``low`` and ``high``, and where the paper has
    figures ``paper`` and ``difference``. ``mean`` is over ``mean_of`` columns; ``note`` says why figures are missing.
    """
    columns = list(dict.fromkeys(column for grid in grids for column in grid.columns))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("mean", "mean_of", "note")
    writer.writerow([*FIXED, *(f"column {c}" if c in {*FIXED, *ends} else c for c in columns), *ends])
    for grid in grids:
        for row in grid.rows:
            names = (grid.data, grid.victim, grid.judge, grid.seed, row, next(iter(grid.of_row(row).values())).defense)
            for figure, line in _csv_lines(grid, row, measure):
                if not line.values and figure != "ours":
                    continue
                unit, digits = ("images", 0) if figure == "n" else (measure.unit, measure.digits + 1)
                values = [f"{line.values[c]:.{digits}f}" if c in line.values else "" for c in columns]
                mean = ("", "") if line.mean is None else (f"{line.mean:.{digits}f}", len(line.averaged))
                note = "; ".join(grid.legend(measure).get(row, ())) if figure == "ours" else ""
                writer.writerow([*names, figure, unit, *values, *mean, note])
    return text.getvalue()


def _csv_lines(grid: Grid, row: str, measure: Measure) -> Iterator[tuple[str, Line]]:
    yield "ours", grid.ours(row, measure)
    yield "n", grid.field(row, "n")
    if measure.number == 1:
        for name in ("low", "high"):
            yield name, grid.field(row, name, scale=measure.scale)
    paper = beside_the_paper(grid, measure)
    if paper is not None and row in paper.rows:
        lines = paper.lines(grid, row, measure)
        yield "paper", lines["paper"]
        yield "difference", lines["difference"]
