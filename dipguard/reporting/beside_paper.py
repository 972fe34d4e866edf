"""The paper's figures beside one's own: which rows and columns both have, and the differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dipguard.reporting.matrix_lines import Grid, Line, Measure
from dipguard.reporting.paper_figures import (
    COLUMNS,
    DEFENSES,
    SETTINGS,
    SOURCE,
    PaperRow,
    PaperSetting,
    paper_column,
    paper_data,
)
from dipguard.reporting.stored_results import ResultRow


@dataclass(frozen=True)
class Beside:
    """What the paper has of a grid: the columns and rows of both, and what they were measured on there."""

    setting: PaperSetting
    columns: tuple[str, ...]
    rows: Mapping[str, PaperRow]

    def lines(self, grid: Grid, row: str, measure: Measure) -> dict[str, Line]:
        """One's own figures, the paper's, and own minus paper's; all three means are over the same columns."""
        ours = grid.ours(row, measure, self.columns)
        given = self.rows[row]
        figures = {column: figure for column in self.columns if (figure := given.of(column)) is not None}
        paper = Line(figures, tuple(ours.values) or self.columns)
        difference = Line({c: value - figures[c] for c, value in ours.values.items()}, tuple(ours.values))
        return {"ours": ours, "paper": paper, "difference": difference}

    def note(self, grid: Grid, measure: Measure) -> str:
        """What the two have in common and what not."""
        victim = "other images" if grid.victim == self.setting.victim else "another victim and other images"
        text = (
            f"The paper's figures ({SOURCE}, Table {measure.number}, {self.setting.data}) were measured on "
            f"{self.setting.described}; ours on {grid.data} with {grid.victim}: {victim}, and settings of the defences "
            "and attacks that may differ too. A difference is ours minus the paper's. Means are over the columns that "
            "have figures of both."
        )
        for given in {row.name: row for row in self.rows.values()}.values():
            mean = sum(given.figures) / len(given.figures)
            if len(self.columns) == len(COLUMNS) and abs(mean - given.mean) > 10**-measure.digits:
                text += (
                    f" For {given.name} the paper prints a mean of {measure.text(given.mean)}, while its 15 figures "
                    f"give {measure.text(mean)}."
                )
        return text


def beside_the_paper(grid: Grid, measure: Measure) -> Beside | None:
    """What the paper's table has of a grid; None where that is nothing, or another judge than the victim reads."""
    data = paper_data(grid.data, grid.victim)
    if data is None or grid.judge != grid.victim:
        return None
    cells = grid.cells.values()
    columns = {cell.column for cell in cells if _same_attack(cell)}
    named = {cell.row: DEFENSES.get(cell.defense, "") for cell in cells}
    rows = {row: measure.paper[data][named[row]] for row in grid.rows if named[row] in measure.paper[data]}
    shared = tuple(column for column in grid.columns if column in columns)
    return Beside(SETTINGS[data], shared, rows) if shared and rows else None


def _same_attack(cell: ResultRow) -> bool:
    column = paper_column(cell.column)
    return column is not None and (column.attack, column.eps_255) == (cell.attack, cell.eps_255)
