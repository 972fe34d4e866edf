"""A sweep's figures, in the manner of Figures 6 and 7 of Ding et al. 2021: lines of one parameter, maps of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from dipguard.config import DefenseConfig
from dipguard.reporting.canvas import DPI, short
from dipguard.reporting.curves_figure import COLOURS, MARKERS, STROKES
from dipguard.reporting.paper_figures import head_of
from dipguard.reporting.sweep_folder import Sweep, Value, text_of
from dipguard.reporting.sweep_grid import MEAN, Share, Slice, accuracy_of, is_numeric, profile, slices, table_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SYMBOLS = {"tau": r"$\tau$", "t0": "$t_0$", "beta": r"$\beta$", "K": "$K$", "T": "$T$"}
PANEL, TALL, LEGEND = 3.0, 2.9, 1.5
"""Width and height of a panel, and width of the legend, inches."""
ACROSS = 4
"""Most panels side by side."""
MOST_LINES = 12
"""Thin lines that a panel can bear."""


def draw_mean_lines(sweep: Sweep, *, row: str) -> Figure | None:
    """The mean accuracy over the columns against each parameter (Figure 6), with 95 % bands; None without lines."""
    keys = [key for key in sweep.parameters if len(profile(sweep, key, row=row, column=MEAN)) > 1]

    def draw(ax: Axes, key: str) -> None:
        _thin_lines(ax, sweep, key, row=row)
        shares = profile(sweep, key, row=row, column=MEAN)
        x = _places(sweep, key, list(shares))
        low, high = ([100 * getattr(share, end) for share in shares.values()] for end in ("low", "high"))
        ax.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        ax.plot(x, _percents(shares), color=COLOURS[0], linewidth=1.8, marker="o", markersize=5)

    thin = any(1 < len(slices(sweep, key)) <= MOST_LINES for key in keys)
    note = f"band: 95 % Wilson interval, {_images(sweep)}" + "; thin: at each value of the other parameters" * thin
    several = len(sweep.columns) > 1
    title = f"mean accuracy over {len(sweep.columns)} columns" if several else f"accuracy, {head_of(sweep.columns[0])}"
    return _panels(sweep, keys, draw, title=title, note=note)


def draw_column_lines(sweep: Sweep, *, row: str) -> Figure | None:
    """The accuracy in each column against each parameter (Figure 7); None without lines, or with a single column."""
    keys = [
        key for key in sweep.parameters if any(len(profile(sweep, key, row=row, column=c)) > 1 for c in sweep.columns)
    ]
    if len(sweep.columns) == 1:  # its mean is the column itself
        return None
    drawn: dict[str, Artist] = {}

    def draw(ax: Axes, key: str) -> None:
        for i, column in enumerate(sweep.columns):
            shares = profile(sweep, key, row=row, column=column)
            if len(shares) < 2:
                continue
            x, colour = _places(sweep, key, list(shares)), COLOURS[i % len(COLOURS)]
            low, high = ([100 * getattr(share, end) for share in shares.values()] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=colour, alpha=0.07, linewidth=0)
            style: dict[str, Any] = {
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": STROKES[i // len(COLOURS) % len(STROKES)],
            }
            (line,) = ax.plot(x, _percents(shares), color=colour, linewidth=1.5, markersize=4.5, **style)
            drawn[column] = line

    figure = _panels(
        sweep,
        keys,
        draw,
        title="accuracy by column",
        note=f"bands: 95 % Wilson intervals, {_images(sweep)}",
        legend=True,
    )
    if figure is not None:
        names = [short(head_of(column), 18) for column in drawn]
        figure.legend(list(drawn.values()), names, loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_map(sweep: Sweep, pair: tuple[str, str], tables: Sequence[Slice], *, row: str) -> Figure:
    """A map of two parameters: a panel for the mean and one for each column."""
    from matplotlib.figure import Figure

    columns = [MEAN, *sweep.columns] if len(sweep.columns) > 1 else list(sweep.columns)
    values = [
        [v for v in sweep.parameters[key] if any(v == jobs[i] for t in tables for jobs in t.jobs)]
        for i, key in enumerate(pair)
    ]
    across = min(3, len(columns))
    down = ceil(len(columns) / across)
    wide, tall = 1.3 + 0.62 * len(values[0]), 1.1 + 0.42 * len(values[1])
    size = (max(4.6, across * max(wide, 2.3)), 1.0 + down * max(tall, 1.8))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, column in zip(axes, columns, strict=False):
        _draw_map(ax, table_of(tables, sweep, row=row, column=column), values)
        if not is_numeric(values[1]):  # names are read from the top, as in a table
            ax.invert_yaxis()
        ax.set_title("mean" if column == MEAN else head_of(column), fontsize=10)
        ax.set_xlabel(_symbol(sweep, pair[0]))
        ax.set_ylabel(_symbol(sweep, pair[1]))
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    figure.suptitle(f"{sweep.name}: accuracy, %", fontsize=11, fontweight="bold")
    over = f"; means over {len(tables)} settings of the others" if len(tables) > 1 else ""
    figure.supxlabel(f"{_images(sweep)}; dark is a panel's highest{over}", fontsize=8)
    return figure


def _draw_map(ax: Axes, shares: Mapping[tuple[Value, ...], Share], values: Sequence[Sequence[Value]]) -> None:
    import numpy as np

    grid = np.full((len(values[1]), len(values[0])), np.nan)
    for i, one in enumerate(values[0]):
        for j, other in enumerate(values[1]):
            if (one, other) in shares:
                grid[j, i] = 100 * shares[one, other].value
    known = grid[np.isfinite(grid)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    # Half a range below the lowest, so that no cell is as pale as one without a figure.
    ax.imshow(grid, cmap="Blues", vmin=low - max(high - low, 1.0) / 2, vmax=high, aspect="auto", origin="lower")
    for (j, i), value in np.ndenumerate(grid):
        dark = np.isfinite(value) and high > low and value > (low + high) / 2
        text = f"{value:.0f}" if np.isfinite(value) else "\N{EN DASH}"
        ax.text(i, j, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    ax.set_xticks(range(len(values[0])), [text_of(value) for value in values[0]], fontsize=8)
    ax.set_yticks(range(len(values[1])), [text_of(value) for value in values[1]], fontsize=8)
    ax.spines[:].set_visible(False)


def _panels(
    sweep: Sweep,
    keys: Sequence[str],
    draw: Callable[[Axes, str], None],
    *,
    title: str,
    note: str,
    legend: bool = False,
) -> Figure | None:
    """A panel a parameter, all with one scale of accuracy."""
    from matplotlib.figure import Figure

    if not keys:
        return None
    across = min(ACROSS, len(keys))
    down = ceil(len(keys) / across)
    size = (max(5.0, PANEL * across + LEGEND * legend), 0.7 + TALL * down)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for ax, key in zip(axes.ravel(), keys, strict=False):
        draw(ax, key)
        _finish(ax, sweep, key)
    for ax in axes.ravel()[len(keys) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, %")
    figure.suptitle(f"{sweep.name}: {title}", fontsize=11, fontweight="bold")
    figure.supxlabel(note, fontsize=8)
    return figure


def _thin_lines(ax: Axes, sweep: Sweep, key: str, *, row: str) -> None:
    lines = slices(sweep, key)
    if not 1 < len(lines) <= MOST_LINES:
        return
    for line in lines:
        shares = {
            v[0]: share for v, job in line.jobs.items() if (share := accuracy_of(sweep, job, row=row, column=MEAN))
        }
        ax.plot(_places(sweep, key, list(shares)), _percents(shares), color="#999999", linewidth=0.8, marker=".")


def _finish(ax: Axes, sweep: Sweep, key: str) -> None:
    values = sweep.parameters[key]
    paper = getattr(DefenseConfig(), sweep.labels[key], None)
    if is_numeric(values) and isinstance(paper, int | float) and min(values) <= paper <= max(values):  # type: ignore[type-var,operator]
        ax.axvline(paper, color="#bbbbbb", linewidth=1, linestyle=":", zorder=0)
        last = paper == max(values)  # type: ignore[type-var]
        ax.annotate("paper", (paper, 1), (-2 if last else 2, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize=7, color="#888888", va="top",
                    ha="right" if last else "left")  # fmt: skip
    ax.set_xticks(_places(sweep, key, values), [text_of(value) for value in values], fontsize=8)
    if not is_numeric(values):
        ax.margins(x=0.2)
    if sum(len(text_of(value)) for value in values) > 30:
        ax.tick_params(axis="x", rotation=35)
    ax.set_xlabel(_symbol(sweep, key))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)


def _symbol(sweep: Sweep, key: str) -> str:
    return SYMBOLS.get(sweep.labels[key], sweep.labels[key])


def _places(sweep: Sweep, key: str, values: Sequence[Value]) -> list[float]:
    """Numbers where they are, everything else side by side."""
    all_values = sweep.parameters[key]
    return [float(v) if is_numeric(all_values) else float(all_values.index(v)) for v in values]  # type: ignore[arg-type]


def _percents(shares: Mapping[Value, Share]) -> list[float]:
    return [100 * share.value for share in shares.values()]


def _images(sweep: Sweep) -> str:
    counts = {cell.n for job in sweep.done for cell in job.cells if cell.n is not None}
    low, high = min(counts), max(counts)
    return f"{low} image{'s' * (low != 1)} a column" if low == high else f"{low} to {high} images a column"
