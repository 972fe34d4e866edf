"""What the figures share: pictures with their decisions, colours, plain axes, and how a PNG is written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
