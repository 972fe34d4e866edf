"""Intermediate images of a defence, as an adaptive attack sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

STITCHED = "stitched"
"""Name of the intermediate that every defence has: its final reconstruction."""


@dataclass(frozen=True, eq=False)
class Intermediate:
    """V images of a defence for each of B given images, and how the victim views them.

    Attributes:
        views: [V, B, 3, H, W] in [0, 1], detached.
        view: Differentiable map of images [n, 3, H, W] to images of the same shape, applied before the victim reads
            them (such as a mirror); None if the victim reads them as they are.
        scores: Differentiable map of the victim's logits on the viewed images, [V, B, C], and on the given ones,
            [B, C], to the scores [B, C] that the defence decides by; None if it looks at the views alone.
    """

    views: Tensor
    view: Callable[[Tensor], Tensor] | None = None
    scores: Callable[[Tensor, Tensor], Tensor] | None = None

    def viewed(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] as the victim gets to see them."""
        return images if self.view is None else self.view(images)
