"""Images side by side: a panel of one defence, and the comparison of several (Figure 9 of Ding et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dipguard.reporting.canvas import DPI, Picture, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (1, 2, 5, 10, 20, 50)
"""Factors by which a difference may be amplified."""
WIDE, TALL, TOP, LEFT = 1.9, 2.3, 0.7, 0.5
"""Inches: width and height of a picture with its captions, height of the heads, width of the rows' names."""


def draw_grid(heads: Sequence[str], rows: Mapping[str, Sequence[Picture]]) -> Figure:
    """One column for each head, one row for each image; ``rows`` holds the pictures by the row's title.

    The figure is (``LEFT`` + ``WIDE`` per column) x (``TOP`` + ``TALL`` per row) inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(LEFT + WIDE * len(heads), TOP + TALL * len(rows)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), len(heads), squeeze=False)
    for axes, (title, pictures) in zip(grid, rows.items(), strict=True):
        for ax, picture in zip(axes, pictures, strict=True):
            picture.draw_on(ax)
        axes[0].set_ylabel(title, fontsize=9)
    for ax, head in zip(grid[0], heads, strict=True):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
        ax.annotate(short(head), (0.5, 1), (0, 20), fontsize=9, fontweight="bold", **place)
    return figure


def draw_panel(rows: Mapping[str, Sequence[Picture]]) -> Figure:
    """`draw_grid` of the clean, the given and the reconstructed image, and the amplified difference of the last two."""
    differences = [_difference(given.image, rebuilt.image) for *_, given, rebuilt in rows.values()]
    factor = amplification(torch.stack(differences))
    full = {
        title: [*pictures, Picture(0.5 + factor * difference)]
        for (title, pictures), difference in zip(rows.items(), differences, strict=True)
    }
    figure = draw_grid(("clean", "given", "reconstruction", f"difference × {factor}"), full)
    figure.supxlabel("difference: given - reconstruction; grey is none", fontsize=9)
    return figure


def amplification(difference: Tensor) -> int:
    """The largest of ``FACTORS`` that keeps 99 % of the values within half the range of an image."""
    high = float(torch.quantile(difference.abs().flatten()[:: max(1, difference.numel() // 1_000_000)].float(), 0.99))
    return max((factor for factor in FACTORS if factor * high <= 0.5), default=1)


def _difference(given: Tensor, rebuilt: Tensor) -> Tensor:
    # A defence may return another size (super resolution).
    size = given.shape[1:]
    return given - torch.nn.functional.interpolate(rebuilt[None].float(), size=size, mode="bilinear")[0]
