"""What the figures share: pictures with decisions, grids of them, colours, plain axes, and how a PNG is written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from dipguard.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
RIGHT, WRONG = "#14713d", "#b3171d"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""The palette of Okabe and Ito (2008), which colour-blind readers can tell apart too."""
MARKERS = "osD^vPX*"
STROKES = ("-", "--", ":")
FACTORS = (1, 2, 5, 10, 20, 50)
"""Factors by which a difference may be amplified."""
WIDE, TALL, TOP, LEFT = 1.9, 2.3, 0.7, 0.5
"""Inches: width and height of a picture with its captions, height of the heads, width of the rows' names."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically. No text is read as a formula: class names and paths may hold dollar signs."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_bytes(path, buffer.getvalue())


class Picture(NamedTuple):
    """An image [3, H, W], the victim's decision on it, and a caption; ``right`` is None without a true class."""

    image: Tensor
    decision: str = ""
    right: bool | None = None
    caption: str = ""

    def draw_on(self, ax: Axes) -> None:
        """Draw the image under its decision, which is marked as right or wrong by sign and colour."""
        values = self.image.detach().float().clamp(0, 1).permute(1, 2, 0).numpy()
        # Small images are shown pixel by pixel: smoothing would hide the very noise that the figure is about.
        ax.imshow(values, interpolation="nearest" if values.shape[0] < 128 else "antialiased")
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(self.caption, fontsize=9)
        known = {None: ("", "black"), True: (" \N{CHECK MARK}", RIGHT), False: (" \N{BALLOT X}", WRONG)}
        sign, colour = known[self.right]
        ax.set_title(short(self.decision) + sign, fontsize=9, color=colour)


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


def short(name: str, most: int = 22) -> str:
    """A name, cut to ``most`` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def class_name(number: int, classes: Sequence[str] = ()) -> str:
    """A class's name, or its number where it has none."""
    return classes[number] if 0 <= number < len(classes) else str(number)


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and stroke of the line with this number in a figure."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STROKES[number // len(COLOURS) % len(STROKES)],
    }


def plain_axes(ax: Axes, *, grid: Literal["x", "y"] = "y") -> None:
    """Axes without a frame at the top and right, with a light grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#eeeeee", linewidth=0.6)
    ax.set_axisbelow(True)
