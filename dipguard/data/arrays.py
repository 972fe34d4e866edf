"""Images from a NumPy archive: the simplest way to use your own."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipguard.data.base import ImageSet, from_bytes, resize, window


def load_arrays(
    *, path: str | Path | None = None, offset: int = 0, limit: int | None = None, size: int | None = None
) -> ImageSet:
    """Labelled images in a ``.npz`` file, read without pickle.

    The file holds ``images`` (uint8 [N, H, W, 3], RGB) and ``labels`` (integers [N], at least 0). With ``test_index``
    (integers [N], all different) these are the indices of the images; without it, their positions in the file are.
    """
    if path is None:
        raise ValueError("`path` must name a .npz file with `images` and `labels`, got None")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"`path` must name an existing .npz file, got {file}")
    names, arrays = _read(file)
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise ValueError(f"`path`: {file} has no array {', '.join(map(repr, missing))}; it holds {names}")
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise TypeError(f"`images` in {file} must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"`images` in {file} must have shape [N, H, W, 3] with N >= 1, got {images.shape}")
    part = window(len(images), offset=offset, limit=limit)
    integers = {}
    for name in ("labels", "test_index"):
        values = arrays.get(name, np.arange(len(images)))
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"`{name}` in {file} must be integers, got {values.dtype}")
        if values.shape != images.shape[:1]:
            raise ValueError(
                f"`{name}` in {file} must have shape {images.shape[:1]}, one per image, got {values.shape}"
            )
        if (low := values[part].min()) < 0:
            raise ValueError(f"`{name}` in {file} must be at least 0, got {low}")
        integers[name] = torch.from_numpy(values[part].astype(np.int64))
    pixels = from_bytes(torch.from_numpy(np.ascontiguousarray(images[part])))
    return ImageSet(resize(pixels, size), integers["labels"], integers["test_index"], name=file.stem)


def _read(file: Path) -> tuple[list[str], dict[str, np.ndarray[Any, Any]]]:
    """The names of an archive's arrays, and those that are ours; ValueError if it is damaged, or no plain arrays."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return sorted(archive), {
                name: np.asarray(archive[name]) for name in ("images", "labels", "test_index") if name in archive
            }
    # What NumPy raises for a damaged or truncated archive; TypeError for a single array.
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`path`: {file} is not a readable .npz file of plain arrays: {error}") from error
