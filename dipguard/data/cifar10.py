"""CIFAR-10 (Krizhevsky, 2009) through torchvision: 60,000 colour images of 32x32 pixels, ten classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from dipguard.cache import cache_folder
from dipguard.checks import check_bool, check_choice
from dipguard.data.base import ImageSet, from_bytes, resize, window
from dipguard.registry import import_extra


def load_cifar10(
    *,
    path: str | None = None,
    offset: int = 0,
    limit: int | None = None,
    size: int | None = None,
    split: str = "test",
    download: bool = True,
) -> ImageSet:
    """CIFAR-10; the index of an image is its position in the split, ``test`` (10,000 images) or ``train`` (50,000).

    ``path`` is the folder that holds ``cifar-10-batches-py``; by default dipguard's cache. With ``download`` it is
    fetched there (170 MB) if it is missing or damaged; RuntimeError otherwise.
    """
    datasets = import_extra("torchvision.datasets", owner="the data set 'cifar10'", extra="vision")
    check_choice(split, ("test", "train"), name="split")
    check_bool(download, name="download")
    folder = cache_folder("cifar10") if path is None else Path(path).expanduser()
    try:
        data = _read(partial(datasets.CIFAR10, str(folder), train=split == "train"), folder, download=download)
    except (OSError, RuntimeError) as error:
        how = "could not be downloaded" if download else "is missing or damaged, and `download` is off"
        advice = f"Unpack {datasets.CIFAR10.url} in `path`, or take images of your own (`data=arrays`)"
        raise RuntimeError(f"CIFAR-10 {how} (`path` is {folder}): {error}. {advice}") from error
    part = window(len(data.targets), offset=offset, limit=limit)
    images = resize(from_bytes(torch.from_numpy(data.data[part])), size)
    labels, indices = torch.tensor(data.targets), torch.arange(len(data.targets))
    return ImageSet(images, labels[part], indices[part], tuple(data.classes), "cifar10")


def _read(cifar10: Callable[..., Any], folder: Path, *, download: bool) -> Any:
    """The data set in a folder, fetched there first if it is missing or damaged."""
    try:
        return cifar10()
    except RuntimeError:
        if not download:
            raise
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # jobs side by side would write into one archive
        return cifar10(download=True)
