"""The visual comparison of reconstructions, in the manner of Figure 9 of Ding et al. 2021 (appendix C)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipguard.checks import check_images, check_int, check_labels
from dipguard.reporting.canvas import DPI, Picture, save_figure, short
from dipguard.reporting.paper_figures import head_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, TOP, LEFT = 1.75, 0.75, 0.5
"""Of a picture with its words, of the heads and of the names of the rows, inches."""


@dataclass(frozen=True, eq=False)
class Scene:
    """The pictures of a column of the figure.

    Attributes:
        images: [N, 3, H, W] in [0, 1].
        decisions: [N] int64; None where none are stored.
        ssim: To the clean images, [N]; None where it is not stored.
    """

    images: Tensor
    decisions: Tensor | None = None
    ssim: Tensor | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Scene:
        """What a file of the run holds."""
        return cls(arrays["images"], arrays["decisions"], arrays.get("ssim"))


def write_comparison(
    folder: str | Path,
    *,
    column: str,
    rows: Sequence[str],
    clean: Tensor,
    classes: Sequence[str],
    count: int = 4,
    labels: Tensor | None = None,
) -> Path:
    """Draw figure9_<column>.png: the first images of a matrix, clean, attacked, and as each defence gives them back.

    Over each stands the judge's decision, marked as right or wrong where ``labels`` are given, and under it its SSIM to
    the clean image. Both are those stored: of the attacked image with it or in the row ``none``, of the clean image in
    the column ``clean``. What the run does not have is left out.

    Args:
        folder: The run folder.
        column: The attack column's label.
        rows: The defence rows' labels; each must have been run on that column.
        clean: The run's clean images [N, 3, H, W] in [0, 1].
        classes: Class names in label order; empty: classes are shown as numbers.
        count: Most images to draw, at least 1.
        labels: True classes, [N].

    Raises:
        TypeError, ValueError: A bad argument, or a stored file that is damaged or holds other images.
        FileNotFoundError: Nothing is stored of the column or of a row (the message names which).
    """
    number = len(check_images(clean, name="clean"))
    check_int(count, name="count", low=1)
    if labels is not None:
        labels = check_labels(labels, count=number)
    scenes, indices = stored_scenes(folder, column=column, rows=rows, clean=clean, labels=labels)
    figure = draw_comparison(scenes, count=min(count, number), classes=classes, labels=labels, indices=indices)
    return save_figure(figure, Path(folder) / f"figure9_{column}.png")


def stored_scenes(
    folder: str | Path, *, column: str, rows: Sequence[str], clean: Tensor, labels: Tensor | None = None
) -> tuple[list[tuple[str, Scene]], Tensor | None]:
    """The scenes of `write_comparison`, each with its head, and the images' indices where they are stored.

    Without the column ``clean`` the clean images stand under their true classes, if those are given. The column
    ``clean`` itself has nothing attacked to show.

    Args, Raises: as in `write_comparison`.
    """
    if not rows:
        raise ValueError("`rows` must name at least one defence row, got none")
    folder, number = Path(folder), len(clean)
    attacked = _load(folder / "attacks" / f"{column}.npz", number, f"`column` {column!r}")
    cells = {row: _load(_cell(folder, column, row), number, f"row {row!r} of column {column!r}") for row in rows}
    undefended = _cell(folder, column, "none")
    if "ssim" not in attacked and undefended.is_file():
        attacked = _load(undefended, number, "row 'none'") | attacked
    scenes = [("clean", _clean_scene(folder, clean, labels))]
    if column != "clean":
        scenes.append((f"attacked: {head_of(column)}", Scene.of(attacked)))
    scenes += [(row, Scene.of(cell)) for row, cell in cells.items()]
    return scenes, next(iter(cells.values())).get("indices")


def draw_comparison(
    scenes: Sequence[tuple[str, Scene]],
    *,
    count: int,
    classes: Sequence[str] = (),
    labels: Tensor | None = None,
    indices: Tensor | None = None,
) -> Figure:
    """A row an image, a column a scene under its name.

    Of (``LEFT`` + ``SIDE`` a scene) x (``TOP`` + ``SIDE`` an image) inches.

    Args:
        scenes: What to draw, each with its head.
        count: Number of images, at most as many as each scene has.
        classes: Class names in label order; empty: numbers.
        labels: True classes, [N]; without them decisions are not marked.
        indices: The images' positions in the whole data set, [N]; by default their positions here.
    """
    from matplotlib.figure import Figure

    size = (LEFT + SIDE * len(scenes), TOP + SIDE * count)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(count, len(scenes), squeeze=False)
    for axes, (head, scene) in zip(grid.T, scenes, strict=True):
        for i, ax in enumerate(axes):
            decision = None if scene.decisions is None else int(scene.decisions[i])
            right = None if labels is None or decision is None else decision == int(labels[i])
            Picture(scene.images[i], class_name(decision, classes), right).draw_on(ax)
            if scene.ssim is not None and bool(scene.ssim[i].isfinite()):
                ax.set_xlabel(f"SSIM {float(scene.ssim[i]):.3f}", fontsize=8)
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
        axes[0].annotate(short(head), (0.5, 1), (0, 20), fontsize=9, fontweight="bold", **place)
    for i, ax in enumerate(grid[:, 0]):
        ax.set_ylabel(f"image {i if indices is None else int(indices[i])}", fontsize=9)
    return figure


def class_name(decision: int | None, classes: Sequence[str]) -> str:
    """A class as a person reads it; its number where it has no name, nothing where nothing was decided."""
    if decision is None:
        return ""
    return classes[decision] if 0 <= decision < len(classes) else str(decision)


def _cell(folder: Path, column: str, row: str) -> Path:
    return folder / "cells" / column / f"{row}.npz"


def _clean_scene(folder: Path, clean: Tensor, labels: Tensor | None) -> Scene:
    path = folder / "attacks" / "clean.npz"
    if path.is_file():
        return Scene(clean, _load(path, len(clean), "`column` 'clean'")["decisions"])
    return Scene(clean, labels)


def _load(path: Path, number: int, what: str) -> dict[str, Tensor]:
    """The arrays ``images``, ``decisions`` and, if stored, ``ssim`` and ``indices`` of a file, as tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} has no stored result: there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as saved:
            names = [name for name in ("images", "decisions", "ssim", "indices") if name in saved.files]
            arrays = {name: torch.from_numpy(np.asarray(saved[name])) for name in names}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a NumPy archive of a run, but it is damaged: {error}") from error
    for name in ("images", "decisions"):
        if name not in arrays:
            raise ValueError(f"{path} must hold `{name}`, it holds {', '.join(arrays) or 'nothing'}")
    for name, values in arrays.items():
        if values.ndim == 0 or len(values) != number:
            raise ValueError(f"{path} must hold {number} {name}, as many as `clean`, got {tuple(values.shape)}")
    check_images(arrays["images"], name=f"images of {path}")
    return arrays
