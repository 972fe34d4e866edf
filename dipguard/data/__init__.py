"""Data sets: labelled images in [0, 1]. A new one is a row of `DATASETS` or an entry point of ``dipguard.data``."""

from __future__ import annotations

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
"""Name -> loader. Its options are keyword-only; ``path, offset, limit, size`` (see `load_data`) have defaults."""


def load_data(name: str, **options: Any) -> ImageSet:
    """Return a data set by name (a key of `DATASETS`, or a name that another package registers), or a part of it.

    ``options`` are those of the loader; TypeError for an unknown one. All loaders take these:

    - ``path``: file or folder of the data set, where it has one; FileNotFoundError if there is nothing
    - ``limit`` (None: all) and ``offset`` (0): number of images, and position of the first. Neither changes the index
      of an image.
    - ``size``: resize images to size x size pixels (bilinear, antialiased); None keeps their size
    """
    load = lookup(table_of("data", DATASETS), name, argument="data")
    check_options(load, options, owner=f"the data set {name!r}")
    return load(**options)
