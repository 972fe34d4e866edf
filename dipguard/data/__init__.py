"""Data sets: labelled images in [0, 1]. A new one is a row of `DATASETS` or an entry point of ``dipguard.data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dipguard.data.base import ImageSet
from dipguard.registry import check_options, lookup, table_of

__all__ = ["DATASETS", "ImageSet", "load_data"]

DATASETS: dict[str, str] = {
    "digits": "dipguard.data.digits:load_digits",
    "cifar10": "dipguard.data.cifar10:load_cifar10",
    "arrays": "dipguard.data.arrays:load_arrays",
    "image_folder": "dipguard.data.image_folder:load_image_folder",
}
"""Name -> loader. It takes ``path, offset, limit, size`` (see `load_data`) and its own options, all keyword-only."""


def load_data(
    name: str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    size: int | None = None,
    **options: Any,
) -> ImageSet:
    """Return a data set by name, or a part of it.

    Args:
        name: A key of `DATASETS`, or a name that another package registers.
        path: File or folder of the data set, where it has one; FileNotFoundError if there is nothing.
        limit: Number of images; None for all from ``offset`` on.
        offset: Position of the first image. Neither changes the index of an image.
        size: Resize images to size x size pixels (bilinear, antialiased); None keeps their size.
        options: Options of the loader; TypeError for an unknown one.
    """
    load = lookup(table_of("data", DATASETS), name, argument="data")
    check_options(load, options, owner=f"the data set {name!r}", hidden=("path", "offset", "limit", "size"))
    return load(path=path, offset=offset, limit=limit, size=size, **options)
