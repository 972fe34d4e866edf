"""The ladder as a picture: each row's accuracy going down from rung to rung."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dipguard.reporting.canvas import DPI, save_figure, short
from dipguard.reporting.curves_figure import COLOURS, MARKERS
from dipguard.reporting.ladder_lines import CLEAN, WORST, LadderRow, read_ladder, rows_of, rungs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, RUNG_HEIGHT, MARGIN = 8.0, 0.42, 1.6
"""Of the figure, of a rung, and of title and legend, inches."""
SPREAD = 0.6
"""Share of a rung's height over which its rows are spread."""


def write_ladder_figure(folder: str | Path) -> Path:
    """Draw ladder.png from the folder's ladder.csv.

    Raises:
        FileNotFoundError: No ladder.csv in the folder.
        ValueError: It is damaged, or holds no cell.
    """
    folder = Path(folder)
    return save_figure(draw_ladder(read_ladder(folder / "ladder.csv")), folder / "ladder.png")


def draw_ladder(cells: Sequence[LadderRow]) -> Figure:
    """Accuracy (to the right) of each row under each rung (downwards), with 95 % Wilson intervals.

    Args:
        cells: As :func:`~dipguard.reporting.ladder_lines.read_ladder` gives them; those without figures leave a gap.

    Raises:
        ValueError: No cells.
    """
    from matplotlib.figure import Figure

    if not cells:
        raise ValueError("`cells` must hold at least one cell, got none")
    rows, rungs = rows_of(cells), rungs_of(cells)
    height = RUNG_HEIGHT * len(rungs) * max(1.0, len(rows) / 5) + MARGIN
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for number, row in enumerate(rows):
        offset = SPREAD * (number / max(1, len(rows) - 1) - 0.5) if len(rows) > 1 else 0.0
        _draw_row(ax, [cell for cell in cells if cell.row == row and cell.done], rungs, number, offset)
    _finish(ax, cells, rungs)
    figure.legend(loc="outside upper center", ncols=min(len(rows), 6), frameon=False, fontsize=9)
    counts = {cell.n for cell in cells if cell.n is not None}
    images = f"n = {min(counts)}" if len(counts) == 1 else f"n = {min(counts)} to {max(counts)}" if counts else "no"
    figure.supxlabel(
        f"{cells[0].data}, victim {cells[0].victim}; {images} images; bars: 95 % Wilson intervals", fontsize=9
    )
    return figure


def _draw_row(ax: Axes, cells: Sequence[LadderRow], rungs: Sequence[str], number: int, offset: float) -> None:
    style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    y = [rungs.index(cell.rung) + offset for cell in cells]
    x = [100 * (cell.accuracy or 0.0) for cell in cells]
    low, high = ([100 * (getattr(cell, end) or 0.0) for cell in cells] for end in ("low", "high"))
    ax.hlines(y, low, high, color=style["color"], linewidth=3, alpha=0.22)
    label = short(cells[0].row, 20) if cells else None
    ax.plot(x, y, linestyle="none", markersize=5.5, label=label, **style)  # type: ignore[arg-type]


def _finish(ax: Axes, cells: Sequence[LadderRow], rungs: Sequence[str]) -> None:
    titles = {cell.rung: cell.title for cell in cells}
    ax.set_yticks(range(len(rungs)), [short(titles[rung], 32) for rung in rungs], fontsize=9)
    ax.set(xlim=(-2, 102), ylim=(len(rungs) - 0.5, -0.5), xlabel="accuracy, %")
    for label, rung in zip(ax.get_yticklabels(), rungs, strict=True):
        label.set_fontweight("bold" if rung in (CLEAN, WORST) else "normal")
    for line in range(1, len(rungs)):
        ax.axhline(line - 0.5, color="#bbbbbb" if rungs[line] == WORST or line == 1 else "#eeeeee", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)
