"""A matrix as the lines of its tables: figures by column, their mean, and why some are missing.

All three forms of a table (Markdown, CSV, LaTeX) are written from these lines, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dipguard.reporting.canvas import short
from dipguard.reporting.paper_figures import COLUMNS, TABLE_1, TABLE_2, PaperRow, head_of
from dipguard.reporting.stored_results import DONE, ResultRow


@dataclass(frozen=True)
class Measure:
    """What a table shows: the paper's table of that number, and how its figures are taken from a cell and printed."""

    number: int
    title: str
    field: str
    unit: str
    scale: float
    digits: int
    paper: Mapping[str, Mapping[str, PaperRow]]

    def value(self, cell: ResultRow) -> float | None:
        """The cell's figure in the table's unit; None where it has none."""
        value: float | None = getattr(cell, self.field)
        return None if value is None else self.scale * value

    def text(self, value: float, *, sign: bool = False) -> str:
        """A figure as it is printed."""
        rounded = round(value, self.digits) + 0.0  # no "-0.0"
        return f"{rounded:{'+' if sign else ''}.{self.digits}f}"


MEASURES = (
    Measure(1, "accuracy, %", "accuracy", "%", 100.0, 1, TABLE_1),
    Measure(2, "SSIM to the clean image", "ssim", "SSIM", 1.0, 3, TABLE_2),
)
"""Tables 1 and 2."""


@dataclass(frozen=True)
class Line:
    """A line of figures.

    Attributes:
        values: By column, in the table's unit; columns without a figure are left out.
        averaged: The columns that its mean is over.
    """

    values: Mapping[str, float]
    averaged: Collection[str] = ()

    @property
    def mean(self) -> float | None:
        """Mean over the columns ``averaged``; None where there are none."""
        chosen = [self.values[column] for column in self.averaged]
        return sum(chosen) / len(chosen) if chosen else None


@dataclass(frozen=True)
class Grid:
    """The cells of one data set, victim, judge and seed.

    Attributes:
        columns: Their labels: the paper's columns in the paper's order, then the others in the order of the results.
        rows: The rows' labels, in the order of the results.
        cells: By (row, column); cells that were not run yet are absent.
    """

    data: str
    victim: str
    judge: str
    seed: int
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: Mapping[tuple[str, str], ResultRow]

    @property
    def title(self) -> str:
        """What the figures were measured on."""
        judge = "" if self.judge == self.victim else f", read by {self.judge}"
        return f"{self.data}, victim {self.victim}{judge}, seed {self.seed}"

    @property
    def counts(self) -> str:
        """How many images the cells are of."""
        counts = {cell.n for cell in self.cells.values() if cell.done and cell.n is not None}
        if not counts:
            return "No cell has figures yet."
        low, high = min(counts), max(counts)
        return f"{low} image{'s' * (low != 1)} a cell." if low == high else f"{low} to {high} images a cell."

    def of_row(self, row: str) -> dict[str, ResultRow]:
        """The cells of a row that were run, by column."""
        return {column: self.cells[row, column] for column in self.columns if (row, column) in self.cells}

    def why_empty(self, row: str) -> str | None:
        """Why a row has no figure at all; None where it has one, or where its cells give different reasons."""
        reasons = {cell.status for cell in self.of_row(row).values()}
        return reasons.pop() if len(reasons) == 1 and DONE not in reasons else None

    def ours(self, row: str, measure: Measure, columns: Collection[str] | None = None) -> Line:
        """The run's own figures of a row, over all columns or some."""
        cells = {c: cell for c, cell in self.of_row(row).items() if columns is None or c in columns}
        values = {c: value for c, cell in cells.items() if (value := measure.value(cell)) is not None}
        return Line(values, tuple(values))

    def field(self, row: str, name: str, *, scale: float = 1.0) -> Line:
        """Another figure of a row's cells, such as ``low``, ``high`` or ``n``; it has no mean."""
        done = {column: cell for column, cell in self.of_row(row).items() if cell.done}
        return Line({column: scale * getattr(cell, name) for column, cell in done.items()})

    def legend(self, measure: Measure) -> dict[str, list[str]]:
        """Why cells have no figure: sentences by row; rows without gaps are left out."""
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            cells = self.of_row(row)
            reasons: dict[str, list[str]] = {}
            for column in self.columns:
                if column not in cells:
                    reasons.setdefault("not run yet", []).append(column)
                elif measure.value(cells[column]) is None:
                    why = f"no {measure.unit} stored" if cells[column].done else cells[column].status
                    reasons.setdefault(why, []).append(column)
            for reason, columns in reasons.items():
                where = "" if len(columns) == len(self.columns) else f"{', '.join(map(head_of, columns))}: "
                notes.setdefault(row, []).append(where + reason)
        return notes

    def describe(self, measure: Measure) -> str:
        """What a reader must know: measure, number of images, and what the mean is over."""
        if set(self.columns) == {column.label for column in COLUMNS}:
            mean = "The mean is over all 15 columns of the paper, Clean included."
        else:
            mean = f"The mean is over the {len(self.columns)} columns of this run; the paper's is over its 15."
        return f"{measure.title[0].upper()}{measure.title[1:]}. {self.counts} {mean}"


def in_short(status: str) -> str:
    """The first sentence of a status, to stand in a table."""
    return short(" ".join(status.split()).split(". ")[0], 40)


def split_grids(results: Sequence[ResultRow]) -> list[Grid]:
    """A grid for each data set, victim, judge and seed, in the order of the results."""
    groups: dict[tuple[str, str, str, int], list[ResultRow]] = {}
    for cell in results:
        groups.setdefault((cell.data, cell.victim, cell.judge, cell.seed), []).append(cell)
    return [_grid(key, cells) for key, cells in groups.items()]


def _grid(key: tuple[str, str, str, int], cells: list[ResultRow]) -> Grid:
    labels = list(dict.fromkeys(cell.column for cell in cells))
    known = [column.label for column in COLUMNS if column.label in labels]
    columns = (*known, *(label for label in labels if label not in known))
    rows = tuple(dict.fromkeys(cell.row for cell in cells))
    return Grid(*key, columns, rows, {(cell.row, cell.column): cell for cell in cells})
