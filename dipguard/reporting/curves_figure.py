"""Robustness curves of defence-aware attacks, in the manner of Figures 4 and 5 of Ding et al. 2021."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipguard.reporting.canvas import DPI, save_figure, short
from dipguard.reporting.stored_results import CurveRow, read_curves

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito 2008: told apart by people who are colour-blind too."""
MARKERS = "osD^vPX*"
STROKES = ("-", "--", ":")
PANEL_WIDTH, LEGEND_WIDTH, HEIGHT = 3.6, 1.8, 4.0
"""Of a panel, of the legend beside the panels, and of the figure, inches."""


@dataclass(frozen=True)
class _Kind:
    """What a figure shows: a panel for each value of one thing, curves over another."""

    stem: str
    title: str
    panel: Callable[[CurveRow], float]
    panel_title: Callable[[float], str]
    x: Callable[[CurveRow], float]
    x_label: str


KINDS: Mapping[str, _Kind] = {
    "bpda": _Kind(
        "figure4_bpda",
        "BPDA",
        lambda point: point.eps_255,
        lambda eps: f"$\\epsilon$ = {eps:g}/255",
        lambda point: point.budget,
        "iterations",
    ),
    "hopskipjump": _Kind(
        "figure5_hopskipjump",
        "HopSkipJump",
        lambda point: point.budget,
        lambda queries: f"{queries:g} queries an image",
        lambda point: point.eps_255,
        "$\\epsilon$ in levels of 255",
    ),
}


def write_curves(folder: str | Path) -> list[Path]:
    """Draw the curves of the folder's curves.csv: figure4_bpda.png and figure5_hopskipjump.png, as far as it has them.

    Returns:
        Their paths. With several data sets or victims each gets a picture, its name ending in a number from the second
        on.

    Raises:
        FileNotFoundError: No curves.csv in the folder.
        ValueError: It is damaged, or holds no point yet.
    """
    folder = Path(folder)
    points = read_curves(folder / "curves.csv")
    if not points:
        raise ValueError(f"{folder / 'curves.csv'} holds no point yet: there is no curve to draw")
    styles = curve_styles(points)
    groups: dict[tuple[str, str, str], list[CurveRow]] = {}
    for point in points:
        groups.setdefault((point.attack, point.data, point.victim), []).append(point)
    numbers = {attack: count(1) for attack in KINDS}
    paths = []
    for (attack, _, _), members in groups.items():
        number = next(numbers[attack])
        name = KINDS[attack].stem + (f"_{number}" if number > 1 else "")
        paths.append(save_figure(draw_curves(members, styles), folder / f"{name}.png"))
    return paths


def draw_curves(points: Sequence[CurveRow], styles: Mapping[str, Mapping[str, str]] | None = None) -> Figure:
    """Accuracy against an attack's strength, with the 95 % intervals as bands.

    BPDA: a panel for each eps, over the iterations (Figure 4). HopSkipJump: a panel for each query budget, over eps
    (Figure 5). ``HEIGHT`` x (``PANEL_WIDTH`` a panel + ``LEGEND_WIDTH``) inches.

    Args:
        points: Of one attack on one victim and data set; a curve for each ``row``.
        styles: How each row's curve is drawn; by default `curve_styles` of the points.

    Raises:
        ValueError: No points, or points of different attacks, victims or data sets.
    """
    from matplotlib.figure import Figure

    kinds = {(point.attack, point.data, point.victim) for point in points}
    if len(kinds) != 1:
        raise ValueError(f"`points` must be of one attack, data set and victim, got {sorted(kinds) or 'none'}")
    ((attack, data, victim),) = kinds
    kind, styles = KINDS[attack], styles or curve_styles(points)
    panels = sorted({kind.panel(point) for point in points})
    figure = Figure(figsize=(PANEL_WIDTH * len(panels) + LEGEND_WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    drawn: dict[str, Artist] = {}
    for ax, value in zip(axes, panels, strict=True):
        members = [point for point in points if kind.panel(point) == value]
        for row, curve in _curves(members, kind):
            drawn[row] = _draw_curve(ax, curve, kind, style=styles[row])
        _finish(ax, kind, {kind.x(point) for point in members})
        ax.set_title(kind.panel_title(value), fontsize=10)
    axes[0].set_ylabel("accuracy, %")
    rows = [row for row in styles if row in drawn]
    names = [short(row, 20) for row in rows]
    figure.legend([drawn[row] for row in rows], names, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(_wrapped(f"{kind.title}: {data}, victim {victim}", len(panels)), fontsize=11, fontweight="bold")
    figure.supxlabel(_wrapped(_caption(points), len(panels)), fontsize=9)
    return figure


def curve_styles(points: Sequence[CurveRow]) -> dict[str, dict[str, str]]:
    """Colour, marker and stroke by row: the same in all figures of the same results."""
    rows = dict.fromkeys(point.row for point in points)
    return {
        row: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": STROKES[i // len(COLOURS) % len(STROKES)],
        }
        for i, row in enumerate(rows)
    }


def _curves(points: Sequence[CurveRow], kind: _Kind) -> Iterator[tuple[str, list[CurveRow]]]:
    for row in dict.fromkeys(point.row for point in points):
        yield row, sorted((point for point in points if point.row == row), key=kind.x)


def _draw_curve(ax: Axes, curve: Sequence[CurveRow], kind: _Kind, *, style: Mapping[str, Any]) -> Artist:
    """Draw a band and its line; return the line."""
    x = [kind.x(point) for point in curve]
    low, high = ([100 * getattr(point, end) for point in curve] for end in ("low", "high"))
    if len(curve) == 1:  # a band of no width would not be seen
        ax.vlines(x, low, high, color=style["color"], linewidth=4, alpha=0.25)
    ax.fill_between(x, low, high, color=style["color"], alpha=0.08, linewidth=0)
    for end in (low, high):  # where bands lie over one another, their edges still tell them apart
        ax.plot(x, end, color=style["color"], linewidth=0.6, alpha=0.5)
    (line,) = ax.plot(x, [100 * point.accuracy for point in curve], linewidth=1.5, markersize=4.5, **style)
    return line


def _finish(ax: Axes, kind: _Kind, x: Collection[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(xlabel=kind.x_label, ylim=(-3, 103))
    if len(x) == 1:
        ax.set_xlim(min(x) - 1, max(x) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)


def _caption(points: Sequence[CurveRow]) -> str:
    low, high = min(point.n for point in points), max(point.n for point in points)
    images = f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"{images} images a point; bands are 95 % Wilson intervals"


def _wrapped(text: str, panels: int) -> str:
    """Broken into lines that fit a figure of so many panels."""
    import textwrap

    return "\n".join(textwrap.wrap(text, 50 * panels + 20))
