"""What the figures share: how a picture, a verdict and a PNG are made."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dipguard.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
RIGHT, WRONG = "#14713d", "#b3171d"


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_bytes(path, buffer.getvalue())


def show(ax: Axes, image: Tensor) -> None:
    """Draw an image [3, H, W]; values are cut to [0, 1]."""
    values = image.detach().float().clamp(0, 1).permute(1, 2, 0).numpy()
    # Small images are shown pixel by pixel: smoothing would hide the very noise that the figure is about.
    ax.imshow(values, interpolation="nearest" if values.shape[0] < 128 else "antialiased")
    ax.set(xticks=[], yticks=[])


@dataclass(frozen=True, eq=False)
class Picture:
    """An image [3, H, W] under the class that the victim takes it for; ``right`` is None where nobody can tell."""

    image: Tensor
    decision: str
    right: bool | None = None

    def draw_on(self, ax: Axes) -> None:
        """Draw it, its decision marked as right or wrong in sign and colour."""
        show(ax, self.image)
        sign, colour = {None: ("", "black"), True: (" \N{CHECK MARK}", RIGHT), False: (" \N{BALLOT X}", WRONG)}[
            self.right
        ]
        ax.set_title(short(self.decision) + sign, fontsize=9, color=colour)


def short(name: str, most: int = 22) -> str:
    """A class name, cut to ``most`` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
