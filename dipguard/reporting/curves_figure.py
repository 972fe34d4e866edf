"""Accuracy against the strength of adaptive attacks, like Figures 4 and 5 of Ding et al. 2021."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dipguard.reporting.canvas import DPI, line_style, plain_axes, save_figure, short
from dipguard.reporting.results import images_text

PANEL_WIDTH, LEGEND_WIDTH, HEIGHT = 3.6, 1.8, 4.0
"""Inches: a panel, the legend beside the panels, and the figure's height."""

KINDS: dict[str, tuple[str, str, str, str, str, str]] = {
    "bpda": ("figure4_bpda", "BPDA", "eps_255", "ε = {:g}/255", "budget", "iterations"),
    "hopskipjump": (
        "figure5_hopskipjump", "HopSkipJump", "budget", "{:g} queries an image", "eps_255", "ε in levels of 255"
    ),
}  # fmt: skip
"""File, title, the column of the results that has a panel for each value, its title, and the column of the x axis."""
GROUPS = ("attack_name", "data", "victim", "seed")
"""What the points of a figure have in common."""


def is_drawn(results: pd.DataFrame) -> pd.Series:
    """Which rows have a place in the figures: those of their attacks, with a budget and an eps."""
    return results["budget"].notna() & results["eps_255"].notna() & results["attack_name"].isin(KINDS)


def write_curves(folder: str | Path, results: pd.DataFrame) -> list[Path]:
    """Draw figure4_bpda.png and figure5_hopskipjump.png from the rows of `read_results` that have a budget.

    Each data set, victim and seed has a figure of its own, and so has a second attack with the points of another one;
    from the second figure on its name ends in a number.
    """
    points = results[is_drawn(results) & results["accuracy"].notna()]
    repeat = points.groupby([*GROUPS, "defense", "eps_255", "budget"], dropna=False).cumcount()
    points = points.assign(copy=repeat.groupby(points["attack"]).transform("max"))  # an attack is not torn apart
    styles = {defense: line_style(i) for i, defense in enumerate(points["defense"].unique())}
    paths, numbers = [], Counter[str]()
    for (attack, *_), members in points.groupby([*GROUPS, "copy"], sort=False):
        numbers[attack] += 1
        name = KINDS[attack][0] + (f"_{numbers[attack]}" if numbers[attack] > 1 else "")
        paths.append(save_figure(draw_curves(members, styles), Path(folder) / f"{name}.png"))
    return paths


def draw_curves(points: pd.DataFrame, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy against an attack's strength, with the 95 % intervals as bands.

    ``points`` are of one attack, victim and data set; ``styles`` says how each defence's curve is drawn. The figure is
    ``HEIGHT`` x (``PANEL_WIDTH`` per panel + ``LEGEND_WIDTH``) inches.
    """
    first = points.iloc[0]
    _, name, panel, panel_title, x_column, x_label = KINDS[first["attack_name"]]
    panels = sorted(points[panel].unique())
    figure = Figure(figsize=(PANEL_WIDTH * len(panels) + LEGEND_WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    drawn = {}
    for ax, value in zip(axes, panels, strict=True):
        for defense, curve in points[points[panel] == value].groupby("defense", sort=False):
            ordered = curve.sort_values(x_column)
            x, style = ordered[x_column], styles[defense]
            # Edges tell bands apart that overlap, and show an interval where there is a single point.
            band = {"color": style["color"], "alpha": 0.12, "linewidth": 1.5}
            ax.fill_between(x, 100 * ordered["low"], 100 * ordered["high"], **band)
            (drawn[defense],) = ax.plot(x, 100 * ordered["accuracy"], linewidth=1.5, markersize=4.5, **style)
        ax.set(xlabel=x_label, ylim=(-3, 103))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        ax.set_title(panel_title.format(value), fontsize=10)
        plain_axes(ax)
    axes[0].set_ylabel("accuracy, %")
    names = [short(defense, 20) for defense in drawn]
    figure.legend(list(drawn.values()), names, loc="outside right center", frameon=False, fontsize=9)
    width = 50 * len(panels) + 20
    title = textwrap.fill(f"{name}: {first['data']}, victim {first['victim']}", width)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    images = images_text(points["n"])
    figure.supxlabel(textwrap.fill(f"n = {images} a point; bands are 95 % Wilson intervals", width), fontsize=9)
    return figure
