"""A panel of images: clean | given | reconstruction | difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dipguard.reporting.canvas import DPI, Picture, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACTORS = (1, 2, 5, 10, 20, 50)
"""By how much a difference may be amplified."""


def draw_panel(rows: Mapping[str, tuple[Picture, Picture, Picture]]) -> Figure:
    """A row an image: clean | given | reconstruction | difference of the last two, amplified as its head says.

    Args:
        rows: The clean, the given and the reconstructed image, by the row's title.

    Raises:
        ValueError: No rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("`rows` must hold at least one image, got none")
    differences = [given.image - rebuilt.image for _, given, rebuilt in rows.values()]
    factor = amplification(torch.stack(differences))
    figure = Figure(figsize=(8.4, 1 + 2.2 * len(rows)), dpi=DPI, layout="constrained")
    figure.supxlabel("difference: given - reconstruction; grey is none", fontsize=9)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, (title, pictures), difference in zip(grid, rows.items(), differences, strict=True):
        for ax, picture in zip(axes, pictures, strict=False):
            picture.draw_on(ax)
        show(axes[3], 0.5 + factor * difference)
        axes[0].set_ylabel(title, fontsize=9)
    _head_columns(grid[0], ("clean", "given", "reconstruction", f"difference × {factor}"))
    return figure


def _head_columns(axes: Sequence[Axes], heads: Sequence[str]) -> None:
    for ax, head in zip(axes, heads, strict=True):
        ax.annotate(
            head,
            (0.5, 1),
            (0, 20),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
        )


def amplification(difference: Tensor) -> int:
    """The largest of ``FACTORS`` that keeps 99 % of the values within half the range of an image."""
    high = float(torch.quantile(difference.abs().flatten()[:: max(1, difference.numel() // 1_000_000)].float(), 0.99))
    fitting = [factor for factor in FACTORS if factor * high <= 0.5]
    return fitting[-1] if fitting else FACTORS[0]
