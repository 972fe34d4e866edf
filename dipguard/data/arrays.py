"""Images from a NumPy archive: the simplest way to use your own."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipguard.data.base import ImageSet, from_bytes, resize, window


def load_arrays(
    *, path: str | Path | None = None, offset: int = 0, limit: int | None = None, size: int | None = None
) -> ImageSet:
    """Labelled images in a ``.npz`` file, read without pickle; only the part that is asked for is read.

    The file holds ``images`` (uint8 [N, H, W, 3], RGB) and ``labels`` (integers [N], at least 0). With ``test_index``
    (integers [N], all different) these are the indices of the images; without it, their positions in the file are.
    """
    if path is None:
        raise ValueError("`path` must name a .npz file with `images` and `labels`, got None")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"`path` must name an existing .npz file, got {file}")
    with _opened(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        headers = {name: _header(archive, name)[:2] for name in ("images", "labels", "test_index") if name in names}
    if missing := [name for name in ("images", "labels") if name not in headers]:
        raise ValueError(f"`path`: {file} has no array {', '.join(map(repr, missing))}; it holds {sorted(names)}")
    shape, dtype = headers.pop("images")
    if dtype != np.uint8:
        raise TypeError(f"`images` in {file} must be uint8 in [0, 255], got {dtype}")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"`images` in {file} must have shape [N, H, W, 3] with N >= 1, got {shape}")
    for name, (own, kind) in headers.items():
        if not np.issubdtype(kind, np.integer):
            raise TypeError(f"`{name}` in {file} must be integers, got {kind}")
        if own != shape[:1]:
            raise ValueError(f"`{name}` in {file} must have shape {shape[:1]}, one per image, got {own}")
    part = window(shape[0], offset=offset, limit=limit)
    with _opened(file) as archive:
        images = torch.from_numpy(_rows(archive, "images", part))
        integers = {name: _rows(archive, name, part).astype(np.int64) for name in headers}
    for name, values in integers.items():
        if values.min() < 0:
            raise ValueError(f"`{name}` in {file} must be at least 0, got {values.min()}")
    indices = integers.get("test_index", np.arange(part.start, part.stop))
    labels = torch.from_numpy(integers["labels"])
    return ImageSet(resize(from_bytes(images), size), labels, torch.from_numpy(indices), name=file.stem)


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    # What reading a damaged or truncated archive raises, or one that is none.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`path`: {file} is not a readable .npz file of plain arrays: {error}") from error


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Shape, dtype, whether it is stored by columns, and the length of the header."""
    with archive.open(f"{name}.npy") as stream:
        version, _ = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(stream)
        start = stream.tell()
    if not dtype.hasobject and archive.getinfo(f"{name}.npy").file_size != start + prod(shape) * dtype.itemsize:
        raise ValueError(f"the array {name!r} has another length than its header says")
    return shape, dtype, by_column, start


def _rows(archive: zipfile.ZipFile, name: str, part: slice) -> np.ndarray[Any, Any]:
    """Some rows of an array of numbers; the others are not kept in memory."""
    shape, dtype, by_column, start = _header(archive, name)
    with archive.open(f"{name}.npy") as stream:
        if by_column:
            stream.seek(start)
            own = slice(part.start * dtype.itemsize, part.stop * dtype.itemsize)
            columns = b"".join(stream.read(shape[0] * dtype.itemsize)[own] for _ in range(prod(shape[1:])))
            return np.ascontiguousarray(np.frombuffer(bytearray(columns), dtype).reshape(*shape[:0:-1], -1).T)
        row = prod(shape[1:]) * dtype.itemsize
        stream.seek(start + part.start * row)
        content = stream.read((part.stop - part.start) * row)
    return np.frombuffer(bytearray(content), dtype).reshape(-1, *shape[1:])[: part.stop - part.start]
