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

    Raises:
        FileNotFoundError: No file at ``path``.
        TypeError: An array of the wrong dtype.
        ValueError: No ``path``, a damaged file, a missing array, wrong shapes, or negative labels.
    """
    if path is None:
        raise ValueError("`path` must name a .npz file with `images` and `labels`, got None")
    arrays = _read(Path(path).expanduser())
    images = arrays["images"]
    if images.dtype != np.uint8:
        raise TypeError(f"`images` in {path} must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"`images` in {path} must have shape [N, H, W, 3] with N >= 1, got {images.shape}")
    labels = _integers(arrays["labels"], len(images), name="labels", path=path)
    indices = _integers(arrays.get("test_index", np.arange(len(images))), len(images), name="test_index", path=path)
    part = window(len(images), offset=offset, limit=limit)
    return ImageSet(
        resize(from_bytes(torch.from_numpy(images[part])), size),
        torch.from_numpy(labels[part]),
        torch.from_numpy(indices[part]),
        name=Path(path).stem,
    )


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"`path` must name an existing .npz file, got {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            names = set(archive.files)
            arrays = {str(name): archive[name] for name in ("images", "labels", "test_index") if name in names}
    # OSError and ValueError: not an archive, or objects that need pickle; the others: damaged or truncated archives.
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`path`: {path} is not a readable .npz file of plain arrays: {error}") from error
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        raise ValueError(f"`path`: {path} has no array {', '.join(map(repr, missing))}; it holds {sorted(names)}")
    return arrays


def _integers(array: np.ndarray[Any, Any], count: int, *, name: str, path: str | Path) -> np.ndarray[Any, Any]:
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"`{name}` in {path} must be integers, got {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"`{name}` in {path} must have shape ({count},), one per image, got {array.shape}")
    if array.min() < 0:
        raise ValueError(f"`{name}` in {path} must be at least 0, got {array.min()}")
    return array.astype(np.int64)
