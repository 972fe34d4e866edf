"""Accuracy against the strength of adaptive attacks, like Figures 4 and 5 of Ding et al. 2021."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dipguard.reporting.canvas import DPI, line_style, plain_axes, save_figure, short

PANEL_WIDTH, LEGEND_WIDTH, HEIGHT = 3.6, 1.8, 4.0
"""Inches: a panel, the legend beside the panels, and the figure's height."""


class _Kind(NamedTuple):
    """A figure with a panel for each value of one column of the results, and curves over another."""

    stem: str
    title: str
    panel: str
    panel_title: str
    x: str
    x_label: str


KINDS: Mapping[str, _Kind] = {
    "bpda": _Kind("figure4_bpda", "BPDA", "eps_255", "$\\epsilon$ = {:g}/255", "budget", "iterations"),
    "hopskipjump": _Kind(
        "figure5_hopskipjump",
        "HopSkipJump",
        "budget",
        "{:g} queries an image",
        "eps_255",
        "$\\epsilon$ in levels of 255",
    ),
}


def write_curves(folder: str | Path, results: pd.DataFrame) -> list[Path]:
    """Draw figure4_bpda.png and figure5_hopskipjump.png from the rows of `read_results` that have a budget.

    Each data set, victim and seed has a figure of its own; from the second on its name ends in a number.

    Returns:
        The paths.
    """
    points = results[results["budget"].notna() & results["accuracy"].notna() & results["attack_name"].isin(KINDS)]
    styles = curve_styles(points)
    paths, numbers = [], Counter[str]()
    for (attack, *_), members in points.groupby(["attack_name", "data", "victim", "seed"], sort=False):
        numbers[attack] += 1
        name = KINDS[attack].stem + (f"_{numbers[attack]}" if numbers[attack] > 1 else "")
        paths.append(save_figure(draw_curves(members, styles), Path(folder) / f"{name}.png"))
    return paths


def draw_curves(points: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]] | None = None) -> Figure:
    """Accuracy against an attack's strength, with the 95 % intervals as bands.

    BPDA has a panel for each eps, over the iterations (Figure 4); HopSkipJump a panel for each query budget, over eps
    (Figure 5). The figure is ``HEIGHT`` x (``PANEL_WIDTH`` per panel + ``LEGEND_WIDTH``) inches.

    Args:
        points: Of one attack, victim and data set; each defence has a curve.
        styles: How each defence's curve is drawn; by default `curve_styles` of the points.

    Raises:
        ValueError: No points, or points of different attacks, victims or data sets.
    """
    kinds = points[["attack_name", "data", "victim"]].drop_duplicates().to_numpy().tolist()
    if len(kinds) != 1:
        raise ValueError(f"`points` must be of one attack, data set and victim, got {sorted(kinds) or 'none'}")
    ((attack, data, victim),) = kinds
    kind, styles = KINDS[attack], styles or curve_styles(points)
    panels = sorted(points[kind.panel].unique())
    figure = Figure(figsize=(PANEL_WIDTH * len(panels) + LEGEND_WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    drawn: dict[str, Artist] = {}
    for ax, value in zip(axes, panels, strict=True):
        members = points[points[kind.panel] == value]
        for defense, curve in members.groupby("defense", sort=False):
            drawn[defense] = _draw_curve(ax, curve.sort_values(kind.x), kind.x, style=styles[defense])
        ax.set(xlabel=kind.x_label, ylim=(-3, 103))
        if members[kind.x].nunique() == 1:
            ax.set_xlim(members[kind.x].min() - 1, members[kind.x].max() + 1)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        plain_axes(ax)
        ax.set_title(kind.panel_title.format(value), fontsize=10)
    axes[0].set_ylabel("accuracy, %")
    defenses = [defense for defense in styles if defense in drawn]
    names = [short(defense, 20) for defense in defenses]
    figure.legend([drawn[d] for d in defenses], names, loc="outside right center", frameon=False, fontsize=9)
    width = 50 * len(panels) + 20
    title = textwrap.fill(f"{kind.title}: {data}, victim {victim}", width)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    low, high = int(points["n"].min()), int(points["n"].max())
    images = f"n = {low}" if low == high else f"n = {low} to {high}"
    figure.supxlabel(textwrap.fill(f"{images} images a point; bands are 95 % Wilson intervals", width), fontsize=9)
    return figure


def curve_styles(points: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour, marker and stroke of each defence: the same in all figures of the same results."""
    return {defense: line_style(i) for i, defense in enumerate(dict.fromkeys(points["defense"]))}


def _draw_curve(ax: Axes, curve: pd.DataFrame, x: str, *, style: Mapping[str, Any]) -> Artist:
    """Draw a band and its line; return the line."""
    at, low, high = curve[x], 100 * curve["low"], 100 * curve["high"]
    if len(curve) == 1:  # a band without width would not be seen
        ax.vlines(at, low, high, color=style["color"], linewidth=4, alpha=0.25)
    ax.fill_between(at, low, high, color=style["color"], alpha=0.08, linewidth=0)
    for end in (low, high):  # where bands overlap, their edges still tell them apart
        ax.plot(at, end, color=style["color"], linewidth=0.6, alpha=0.5)
    (line,) = ax.plot(at, 100 * curve["accuracy"], linewidth=1.5, markersize=4.5, **style)
    return line
