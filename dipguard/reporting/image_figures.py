"""Images side by side: a panel of one defence, and the comparison of several (Figure 9 of Ding et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dipguard.reporting.canvas import DPI, Picture, class_name, short, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACTORS = (1, 2, 5, 10, 20, 50)
"""Factors by which a difference may be amplified."""
SIDE, TOP, LEFT = 1.75, 0.85, 0.5
"""Inches of the comparison: a picture with its captions, the heads, and the names of the rows."""


class Scene(NamedTuple):
    """The pictures of one column of the comparison.

    Attributes:
        images: [N, 3, H, W] in [0, 1].
        decisions: The victim's decisions, [N] int64, if known.
        ssim: SSIM to the clean images, [N], if known.
    """

    images: Tensor
    decisions: Tensor | None = None
    ssim: Tensor | None = None


def draw_comparison(
    scenes: Sequence[tuple[str, Scene]],
    *,
    count: int,
    classes: Sequence[str] = (),
    labels: Tensor | None = None,
    indices: Tensor | None = None,
) -> Figure:
    """One row for each image, one column for each scene.

    The figure is (``LEFT`` + ``SIDE`` per scene) x (``TOP`` + ``SIDE`` per image) inches.

    Args:
        scenes: What to draw, by head.
        count: Number of images, at most as many as each scene has.
        classes: Class names in label order; empty for numbers.
        labels: True classes, [N]; without them decisions are not marked as right or wrong.
        indices: The images' positions in the whole data set, [N]; by default their positions here.
    """
    from matplotlib.figure import Figure

    size = (LEFT + SIDE * len(scenes), TOP + SIDE * count)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(count, len(scenes), squeeze=False)
    for axes, (_, scene) in zip(grid.T, scenes, strict=True):
        for i, ax in enumerate(axes):
            decision = None if scene.decisions is None else int(scene.decisions[i])
            right = None if labels is None or decision is None else decision == int(labels[i])
            Picture(scene.images[i], "" if decision is None else class_name(decision, classes), right).draw_on(ax)
            if scene.ssim is not None and bool(scene.ssim[i].isfinite()):
                ax.set_xlabel(f"SSIM {float(scene.ssim[i]):.3f}", fontsize=8)
    _head_columns(grid[0], [short(head) for head, _ in scenes], fontsize=9)
    for i, ax in enumerate(grid[:, 0]):
        ax.set_ylabel(f"image {i if indices is None else int(indices[i])}", fontsize=9)
    return figure


def draw_panel(rows: Mapping[str, tuple[Picture, Picture, Picture]]) -> Figure:
    """One row for each image: clean, given, reconstruction, and the amplified difference of the last two.

    Args:
        rows: The clean, the given and the reconstructed image, by the row's title.

    Raises:
        ValueError: No rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("`rows` must hold at least one image, got none")
    differences = [_difference(given.image, rebuilt.image) for _, given, rebuilt in rows.values()]
    factor = amplification(torch.stack(differences))
    figure = Figure(figsize=(8.4, 1 + 2.2 * len(rows)), dpi=DPI, layout="constrained")
    figure.supxlabel("difference: given - reconstruction; grey is none", fontsize=9)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, (title, pictures), difference in zip(grid, rows.items(), differences, strict=True):
        for ax, picture in zip(axes, pictures, strict=False):
            picture.draw_on(ax)
        show(axes[3], 0.5 + factor * difference)
        axes[0].set_ylabel(title, fontsize=9)
    _head_columns(grid[0], ("clean", "given", "reconstruction", f"difference × {factor}"), fontsize=10)
    return figure


def amplification(difference: Tensor) -> int:
    """The largest of ``FACTORS`` that keeps 99 % of the values within half the range of an image."""
    high = float(torch.quantile(difference.abs().flatten()[:: max(1, difference.numel() // 1_000_000)].float(), 0.99))
    fitting = [factor for factor in FACTORS if factor * high <= 0.5]
    return fitting[-1] if fitting else FACTORS[0]


def _difference(given: Tensor, rebuilt: Tensor) -> Tensor:
    if given.shape == rebuilt.shape:
        return given - rebuilt
    # A defence may return another size (super resolution).
    resized = torch.nn.functional.interpolate(rebuilt[None].float(), size=given.shape[1:], mode="bilinear")
    return given - resized[0]


def _head_columns(axes: Sequence[Axes], heads: Sequence[str], *, fontsize: int) -> None:
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
    for ax, head in zip(axes, heads, strict=True):
        ax.annotate(head, (0.5, 1), (0, 20), fontsize=fontsize, fontweight="bold", **place)
