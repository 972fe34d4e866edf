"""A folder of image files, labelled by a CSV file or by sub-folders (the layouts of ImageNet)."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dipguard.checks import check_int
from dipguard.data.base import ImageSet, from_bytes, resize, window
from dipguard.registry import import_extra

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
KINDS = " ".join(sorted(EXTENSIONS))
BACKGROUND = "white"  # what shows through the transparent parts of a picture
_PIL_8_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def load_image_folder(
    *,
    path: str | Path | None = None,
    offset: int = 0,
    limit: int | None = None,
    size: int | None = None,
    labels_csv: str | Path | None = None,
    image_column: str = "image",
    label_column: str = "label",
    label_base: int = 0,
) -> ImageSet:
    """Image files of a folder, labelled by a CSV or by sub-folders; only the part that is asked for is read.

    The data set is the rows of ``labels_csv`` or, without it, the sub-folders as classes in alphabetical order
    (torchvision's ``ImageFolder``). The index of an image is its position in that order. For the NeurIPS 2017
    development set: ``image_column="ImageId"``, ``label_column="TrueLabel"``, ``label_base=1``. ``size`` ignores the
    aspect ratio; without it, all images must have the same size. `open_rgb` reads them.

    Args:
        labels_csv: CSV file (UTF-8, with a header row) of labels.
        image_column: Its column of file names (paths inside the folder) or ids (file names without extension).
        label_column: Its column of labels.
        label_base: Number of the first class in the CSV, 0 or 1; labels are 0-based afterwards.
    """
    if path is None:
        raise ValueError("`path` must name a folder of pictures, got None")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"`path` must name an existing folder of pictures, got {folder}")
    check_int(label_base, name="label_base", low=0, high=1)
    classes: tuple[str, ...] = ()
    if labels_csv is None:
        columns = ("image_column", image_column, "image"), ("label_column", label_column, "label")
        for name, value, default in (*columns, ("label_base", label_base, 0)):
            if value != default:
                raise ValueError(f"`{name}` belongs to `labels_csv`, which is not given, got {value!r}")
        files, labels, classes = _from_subfolders(folder)
    else:
        rows = _rows(Path(labels_csv).expanduser(), image_column, label_column)
        files, labels = _from_csv(folder, rows, label_base, where=f"`labels_csv`: {labels_csv}, line")
    part = window(len(files), offset=offset, limit=limit)
    images = _read_all(files[part], size)
    return ImageSet(images, torch.tensor(labels[part]), torch.arange(len(files))[part], classes, folder.name)


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files of a folder and its sub-folders, linked ones too, in alphabetical order, but no hidden.

    A folder that is linked to from within itself is entered once.
    """
    found: list[Path] = []
    entered: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(root)) in entered:
            folders.clear()
            continue
        entered.add(real)
        files = (Path(root, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.suffix.lower() in EXTENSIONS and file.is_file()]
    return sorted(found)


def _from_subfolders(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not subfolders:
        raise ValueError(
            f"`path`: {folder} has no sub-folders to take classes from; put each class into a sub-folder, "
            "or give a CSV of labels (`labels_csv`, `image_column`, `label_column`)"
        )
    if loose := [file.name for file in pictures_in(folder) if file.parent == folder]:
        advice = "put each into a sub-folder, or give a CSV of labels (`labels_csv`)"
        raise ValueError(f"`path`: {folder} holds pictures beside its class folders, such as {loose[0]}; {advice}")
    files = [pictures_in(subfolder) for subfolder in subfolders]
    if not all(files):
        raise FileNotFoundError(f"`path`: the class folder {subfolders[files.index([])]} holds no picture ({KINDS})")
    labels = [label for label, pictures in enumerate(files) for _ in pictures]
    return list(chain.from_iterable(files)), labels, tuple(subfolder.name for subfolder in subfolders)


def _from_csv(
    folder: Path, rows: list[tuple[int, str, str]], label_base: int, *, where: str
) -> tuple[list[Path], list[int]]:
    pictures = pictures_in(folder)
    if not pictures:
        raise FileNotFoundError(f"`path`: {folder} holds no picture ({KINDS})")
    # Rows are looked up among the files found, so no row can leave the folder.
    by_name = {file.relative_to(folder).as_posix(): [file] for file in pictures}
    by_id: dict[str, list[Path]] = {}
    for file in pictures:
        by_id.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    lines: dict[Path, int] = {}
    labels = list[int]()
    for line, name, label in rows:
        matches = by_name.get(name) or by_id.get(name, [])
        if not matches:
            raise FileNotFoundError(f"{where} {line}: no picture {name!r} in {folder}")
        if len(matches) > 1:
            found = ", ".join(match.name for match in matches)
            raise ValueError(f"{where} {line}: {name!r} may be any of {found}; name the file")
        if matches[0] in lines:
            raise ValueError(f"{where} {line}: {name!r} is the picture of line {lines[matches[0]]} already")
        try:
            number = int(label) - label_base
        except ValueError:
            raise ValueError(f"{where} {line}: {label!r} is not an integer label") from None
        if number < 0:
            raise ValueError(f"{where} {line}: label {label} is below `label_base` {label_base}")
        lines[matches[0]] = line
        labels.append(number)
    return list(lines), labels


def _rows(table: Path, image_column: str, label_column: str) -> list[tuple[int, str, str]]:
    """Line, image and label of each row of a CSV."""
    if not table.is_file():
        raise FileNotFoundError(f"`labels_csv` must name an existing CSV file, got {table}")
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or ())
            rows = [(reader.line_num, row.get(image_column), row.get(label_column)) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`labels_csv`: {table} is not a readable UTF-8 CSV file: {error}") from error
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if (count := header.count(column)) != 1:
            raise ValueError(f"`{argument}`: {table} has {count or 'no'} column {column!r}; it has {header}")
    if not rows:
        raise ValueError(f"`labels_csv`: {table} has a header and no rows")
    return [(line, (name or "").strip(), (label or "").strip()) for line, name, label in rows]


def _read_all(files: Sequence[Path], size: int | None) -> Tensor:
    images: list[Tensor] = []
    for file in files:
        image = resize(from_bytes(torch.from_numpy(np.array(open_rgb(file)))[None]), size)
        if images and image.shape != images[0].shape:
            first, here = tuple(images[0].shape[-2:]), tuple(image.shape[-2:])
            raise ValueError(f"{file} is {here} and {files[0]} is {first} (height, width); give `size` to resize them")
        images.append(image)
    return torch.cat(images)


def open_rgb(file: Path) -> Image.Image:
    """Read an image file with Pillow as 8-bit RGB, turned upright by its EXIF orientation.

    Transparent parts become `BACKGROUND`, and of several frames the first is taken, both with a warning; ValueError if
    the file cannot be read or has over 8 bits a channel.
    """
    image = import_extra("PIL.Image", owner="a picture", extra="vision")
    ops = import_extra("PIL.ImageOps", owner="a picture", extra="vision")
    try:
        with image.open(file) as given:
            if given.mode not in _PIL_8_BIT:
                raise ValueError(f"its mode is {given.mode}, only 8-bit pictures are read")
            # Of 16 bits Pillow would drop half; BGR;16 is 5, 6 and 5 bits. A PPM's tile has the largest value.
            if re.search(r"(?<!BGR);16|\('RGB', \d{4,}\)", str(given.tile)):
                raise ValueError("it has 16 bits a channel, only 8-bit pictures are read")
            if getattr(given, "n_frames", 1) > 1 and given.format != "MPO":  # a photograph with a preview
                warnings.warn(f"the picture {file} has several frames; the first is taken", UserWarning, stacklevel=2)
            picture = ops.exif_transpose(given)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                if picture.getextrema()[3][0] < 255:
                    text = f"the picture {file} has transparent parts; they become {BACKGROUND}"
                    warnings.warn(text, UserWarning, stacklevel=2)
                    picture = image.alpha_composite(image.new("RGBA", picture.size, BACKGROUND), picture)
            upright: Image.Image = picture.convert("RGB")
    # Pillow raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ... on damaged files.
    except Exception as error:
        raise ValueError(f"the picture {file} cannot be read: {str(error) or type(error).__name__}") from error
    return upright
