"""No attack: the clean column of every table."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dipguard.attacks.base import Attack


class NoAttack(Attack):
    """Returns the images as they came (a copy)."""

    name: ClassVar[str] = "none"
    norm: str = "none"

    @property
    def budget(self) -> float:
        """Nothing may change: 0."""
        return 0.0

    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return ``images``."""
        return images
