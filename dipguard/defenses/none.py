"""No defence: the row that the others are measured against."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dipguard.defenses.base import Purifier


class NoDefense(Purifier):
    """Returns a copy of the images ("No defense" in Table 1)."""

    name: ClassVar[str] = "none"

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Return the image as it is."""
        return image
