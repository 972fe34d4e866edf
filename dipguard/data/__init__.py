"""Data sets: labelled images in [0, 1].

A new one is one file with a ``load_...`` function, and one row in `DATASETS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dipguard.data.base import ImageDataModule, ImageSet
from dipguard.registry import check_options, resolve

__all__ = ["DATASETS", "ImageDataModule", "ImageSet", "load_data"]

DATASETS: dict[str, str] = {
    "digits": "dipguard.data.digits:load_digits",
    "cifar10": "dipguard.data.cifar10:load_cifar10",
    "arrays": "dipguard.data.arrays:load_arrays",
    "image_folder": "dipguard.data.image_folder:load_image_folder",
}
"""Name -> the function that loads it, called with ``path, offset, limit, size`` and its own options (keyword-only)."""


def load_data(
    name: str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    size: int | None = None,
    **options: Any,
) -> ImageSet:
    """Return the data set called ``name`` (a key of `DATASETS`), or a part of it.

    Args:
        name: data set.
        path: its file or folder, where it has one.
        limit: number of images; None for all that follow.
        offset: position of the first image. Neither changes an image's index.
        size: resize to size x size (bilinear, antialiased); None keeps the data set's own size.
        options: the loader's own options.

    Raises:
        TypeError: an option that the loader does not have, or an argument of the wrong type.
        ValueError: an unknown name, ``offset`` beyond the end, ``limit`` below 1, or what the loader itself refuses.
        FileNotFoundError: nothing at ``path``.
    """
    load = resolve(DATASETS, name, argument="data")
    check_options(load, options, owner=f"the data set {name!r}", hidden=("path", "offset", "limit", "size"))
    image_set: ImageSet = load(path=path, offset=offset, limit=limit, size=size, **options)
    return image_set
