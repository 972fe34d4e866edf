"""A defence in a package of its own: random resizing and padding (Xie et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.checks import check_float
from dipguard.defenses import Defense
from dipguard.seeding import image_generator


class RandomResize(Defense):
    """Scale the image down by a random factor and pad it with zeros at random to its old size.

    Broken by Athalye et al. 2018 (EOT).

    Args:
        smallest: Smallest factor, in [0.01, 1].
    """

    name: ClassVar[str] = "random_resize"
    OPTIONS: ClassVar[tuple[str, ...]] = ("smallest",)
    random = True  # factor and position are drawn

    def __init__(self, victim: nn.Module, *, smallest: float = 0.85, seed: int = 0) -> None:
        super().__init__(victim, seed=seed)
        self.smallest = check_float(smallest, name="smallest", low=0.01, high=1.0)

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        """Draw factor and position, resize and pad."""
        draws = torch.rand(3, generator=image_generator(seed=self.seed, index=index, purpose=self.name)).tolist()
        factor = self.smallest + (1 - self.smallest) * draws[0]
        height, width = image.shape[-2:]
        size = (max(1, round(factor * height)), max(1, round(factor * width)))
        small = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
        top, left = int(draws[1] * (height - size[0] + 1)), int(draws[2] * (width - size[1] + 1))
        padded = F.pad(small, (left, width - size[1] - left, top, height - size[0] - top))
        return padded.to(image).clamp(0, 1)
