"""Pictures on disk: find them, read them at a size, and write the purified ones."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dipguard.cli import CommandError
from dipguard.data.image_folder import KINDS, open_rgb, pictures_in
from dipguard.files import write_bytes


class Source(NamedTuple):
    """A given picture: its file, its path inside the given folder, and the path of the purified one inside ``OUT``."""

    path: Path
    name: str
    output: str


def find_pictures(given: Path, out: Path, *, output: str = "") -> list[Source]:
    """Return the pictures of a file or folder that exists, in alphabetical order, without those inside ``out``.

    ``a/cat.jpg`` becomes ``a/cat.png``, or ``a/cat.jpg.png`` where that would be the output of another picture too. A
    file's is ``output``, if it is given. CommandError if there is no picture, or one would be overwritten.
    """
    if given.is_dir():
        inside = out.resolve()
        names = {f.relative_to(given): f for f in pictures_in(given) if not f.resolve().is_relative_to(inside)}
    else:
        names = {Path(given.name): given}
    if not names:
        raise CommandError(f"IN: {given} holds no picture ({KINDS})")
    outputs = _outputs(list(names))
    sources = [Source(file, path.as_posix(), output or outputs[path]) for path, file in names.items()]
    givens = {source.path.resolve() for source in sources}
    for source in sources:
        if (out / source.output).resolve() in givens:
            raise CommandError(f"OUT: {out / source.output} is one of the given pictures; take another folder")
    return sources


def _outputs(names: Sequence[Path]) -> dict[Path, str]:
    """A different output for each picture, also where file names ignore case."""
    long = {path: path.with_name(f"{path.name}.png").as_posix() for path in names}
    short = {path: path.with_suffix(".png").as_posix() for path in names}
    taken = Counter(name.casefold() for name in (*long.values(), *short.values()))
    # figures/a.figure.png is the figure of a.png.
    free = {path for path in names if taken[short[path].casefold()] == 1 and not short[path].endswith(".figure.png")}
    return {path: short[path] if path in free else long[path] for path in names}


def read_picture(path: Path, *, size: Sequence[int], resize: str, interpolation: str) -> Tensor:
    """Read a picture (`open_rgb`) as uint8 [3, height, width], of ``size``.

    ``resize`` is ``crop`` (keep the aspect ratio, cut out the centre) or ``stretch``, ``interpolation`` the name of a
    ``PIL.Image.Resampling`` in lower case. ValueError if the file cannot be read.
    """
    from PIL import Image, ImageOps

    height, width = size
    how = Image.Resampling[interpolation.upper()]
    picture = open_rgb(path)
    if picture.size != (width, height):
        crop = resize == "crop"
        picture = ImageOps.fit(picture, (width, height), how) if crop else picture.resize((width, height), how)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_png(path: Path) -> Tensor:
    """Read a purified picture as uint8 [3, H, W]; ValueError if it is missing or cannot be read."""
    return torch.from_numpy(np.array(open_rgb(path))).permute(2, 0, 1)


def write_png(path: Path, pixels: Tensor) -> None:
    """Write uint8 [3, H, W] as PNG, atomically."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
