"""Tables 1 and 2 of a matrix as LaTeX; a document needs the package booktabs to include them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from dipguard.reporting.beside_paper import beside_the_paper
from dipguard.reporting.matrix_lines import Grid, Line, Measure, in_short
from dipguard.reporting.paper_figures import paper_column

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{EN DASH}": "--",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
NONE = "--"


def escape(text: str) -> str:
    """Text as LaTeX prints it; line breaks become spaces, other control characters are left out."""
    characters = (c for c in " ".join(text.split()) if c.isprintable())
    return "".join(SPECIAL.get(character, character) for character in characters)


def latex_table(grids: Sequence[Grid], measure: Measure) -> str:
    """A ``table*`` for each grid, as wide as the page.

    A row has its figures, below them the 95 % intervals (accuracy alone), and where the paper has figures those and the
    differences.
    """
    parts = ["% Needs \\usepackage{booktabs}; \\textquotedbl needs \\usepackage[T1]{fontenc}."]
    for number, grid in enumerate(grids, start=1):
        name = f"tab:dipguard-{measure.field}" + (f"-{number}" if number > 1 else "")
        parts.append(_environment(grid, measure, name))
    return "\n\n".join(parts) + "\n"


def _environment(grid: Grid, measure: Measure, name: str) -> str:
    lines = [
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{2pt}",
        rf"\caption{{{escape(f'{measure.title[0].upper()}{measure.title[1:]}: {grid.title}')}}}",
        rf"\label{{{name}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) + 1)}}}",
        r"\toprule",
        *_heads(grid.columns),
        *(line for row in grid.rows for line in (r"\midrule", *_rows(grid, row, measure))),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\medskip",
        rf"\begin{{minipage}}{{\textwidth}}{escape(_notes(grid, measure))}\end{{minipage}}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


def _notes(grid: Grid, measure: Measure) -> str:
    parts = [grid.describe(measure)]
    if measure.number == 1:
        parts.append("Small: 95 % Wilson intervals.")
    paper = beside_the_paper(grid, measure)
    if paper is not None:
        parts.append(paper.note(grid, measure))
    gaps = [f"{row}: {note.rstrip('.')}." for row, notes in grid.legend(measure).items() for note in notes]
    return " ".join([*parts, *gaps])


def _heads(columns: Sequence[str]) -> Iterator[str]:
    """Two lines: the attacks, each once over its columns, and their budgets."""
    attacks, budgets = [""], ["Defence"]
    for family, group in groupby(columns, key=_family):
        labels = list(group)
        attacks.append(rf"\multicolumn{{{len(labels)}}}{{c}}{{{escape(family)}}}")
        budgets += [_budget(label) for label in labels]
    yield _line([*attacks, "Mean"])
    yield _line([*budgets, f"of {len(columns)}"])


def _family(label: str) -> str:
    column = paper_column(label)
    return label if column is None else column.family


def _budget(label: str) -> str:
    column = paper_column(label)
    return "" if column is None or column.eps_255 is None else f"{column.eps_255:g}"


def _rows(grid: Grid, row: str, measure: Measure) -> Iterator[str]:
    why, columns = grid.why_empty(row), grid.columns
    ours = grid.ours(row, measure)
    if why is not None:
        yield _line([escape(row), rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{{escape(in_short(why))}}}"])
    else:
        yield _figures(row, ours, grid, measure)
    low, high = (grid.field(row, name, scale=measure.scale).values for name in ("low", "high"))
    if measure.number == 1 and low:
        texts = [rf"{{\tiny {low[c]:.0f}--{high[c]:.0f}}}" if c in low else "" for c in columns]
        yield _line(["", *texts, ""])
    paper = beside_the_paper(grid, measure)
    if paper is not None and row in paper.rows:
        lines = paper.lines(grid, row, measure)
        yield _figures(paper.rows[row].label, lines["paper"], grid, measure)
        if lines["difference"].values:
            yield _figures("difference", lines["difference"], grid, measure, sign=True)


def _figures(label: str, line: Line, grid: Grid, measure: Measure, *, sign: bool = False) -> str:
    def text(value: float) -> str:
        printed = measure.text(value, sign=sign)
        return f"${printed}$" if sign else printed

    mean = NONE if line.mean is None else text(line.mean)
    if line.mean is not None and len(line.averaged) < len(grid.columns):
        mean += rf" ({len(line.averaged)})"
    cells = [text(line.values[c]) if c in line.values else NONE for c in grid.columns]
    return _line([escape(label), *cells, mean])


def _line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"
