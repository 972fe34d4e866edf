"""Pictures on disk: found, read and brought to size; purified ones written with a record of how they were made."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipguard.cli.errors import CommandError
from dipguard.data.image_folder import EXTENSIONS
from dipguard.files import tensor_digest, write_bytes

_RECORD = "dipguard"
"""Keyword of the PNG's text chunk that holds the record."""
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class Source:
    """A given picture: its file, its name (path inside the given folder), and the file for its purified picture."""

    path: Path
    name: str
    target: Path


def find_pictures(given: Path, out: Path) -> list[Source]:
    """The pictures of a file or folder, in alphabetical order; those inside ``out`` are no given ones.

    ``a/cat.jpg`` becomes ``out/a/cat.png``; where ``a/cat.bmp`` would too, both keep their ending: ``cat.jpg.png``.

    Raises:
        CommandError: Nothing there, no pictures, or a purified picture would overwrite a given one.
    """
    if not given.exists():
        raise CommandError(f"IN: {given} does not exist")
    if given.is_dir():
        found = (file for file in given.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
        inside = [(file.relative_to(given), file) for file in found if not file.resolve().is_relative_to(out.resolve())]
        names = {path: file for path, file in sorted(inside) if not any(part.startswith(".") for part in path.parts)}
    else:
        names = {Path(given.name): given}
    if not names:
        raise CommandError(f"IN: {given} holds no picture ({' '.join(sorted(EXTENSIONS))})")
    stems = Counter(str(path.with_suffix("")).casefold() for path in names)
    sources = []
    for path, file in names.items():
        alone = stems[str(path.with_suffix("")).casefold()] == 1
        target = out / (path.with_suffix(".png") if alone else path.with_name(f"{path.name}.png"))
        sources.append(Source(file, path.as_posix(), target))
    givens = {source.path.resolve() for source in sources}
    for source in sources:
        if source.target.resolve() in givens:
            raise CommandError(f"OUT: {source.target} is one of the given pictures; take another folder")
    return sources


def read_picture(path: Path, *, size: tuple[int, int], resize: str, interpolation: str) -> Tensor:
    """A picture as uint8 [3, *size], RGB, upright (as its EXIF orientation says).

    Args:
        path: The file.
        size: Height and width, pixels.
        resize: ``crop`` (shape kept, the middle cut out) or ``stretch``.
        interpolation: A name of ``PIL.Image.Resampling``, in small letters.

    Raises:
        ValueError: It cannot be read.
    """
    from PIL import Image, ImageOps

    how = Image.Resampling[interpolation.upper()]
    height, width = size
    try:
        with Image.open(path) as picture:
            if picture.mode not in _MODES:
                raise ValueError(f"its mode is {picture.mode}, only 8-bit pictures are read")
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        if upright.size != (width, height):
            fitted = ImageOps.fit(upright, (width, height), how) if resize == "crop" else None
            upright = upright.resize((width, height), how) if fitted is None else fitted
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
    # Pillow raises OSError, SyntaxError, ValueError, struct.error, DecompressionBombError, ... on damaged files.
    except Exception as error:
        raise ValueError(str(error).replace(str(path), path.name) or type(error).__name__) from error


def write_picture(path: Path, pixels: Tensor, record: Mapping[str, Any]) -> None:
    """Write uint8 [3, H, W] as PNG, whole or not at all; ``record`` (JSON values) goes into a text chunk."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_text(_RECORD, json.dumps({**record, "pixels": tensor_digest([pixels])}))
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG", pnginfo=notes)
    write_bytes(path, buffer.getvalue())


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a purified picture; None where there is no file, or a damaged or changed one.

    Raises:
        ValueError: A sound picture without a record: somebody else's.
    """
    from PIL import Image

    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(_RECORD)
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        record: dict[str, Any] | None = None if text is None else json.loads(text)
    except Exception:  # as in read_picture: a damaged file is made again
        return None
    if record is None:
        raise ValueError(f"{path} was not written by this command, and is not overwritten")
    return record if record.get("pixels") == tensor_digest([pixels]) else None
