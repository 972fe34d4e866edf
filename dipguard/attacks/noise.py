"""Noise of an attack's norm: the control beside every attack."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.base import Attack
from dipguard.attacks.torchattacks_base import check_levels


class Noise(Attack):
    """x + eps times random signs, clipped to [0, 1]: as far in L-inf as an attack goes, but in no direction of its own.

    What harms no more than this was no attack. It asks the victim nothing.

    Args:
        victim: as in `Attack`.
        eps_255: size of every pixel's change in levels of 0 to 255, above 0; fractions are allowed.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "noise"
    norm: str = "Linf"

    def __init__(self, victim: nn.Module, *, eps_255: float = 8, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.eps_255 = check_levels(eps_255, name="eps_255")

    @property
    def budget(self) -> float:
        """eps on the [0, 1] scale."""
        return self.eps_255 / 255

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps."""
        return {**super().settings, "eps_255": self.eps_255}

    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add the noise; it is drawn on the CPU, so that it is the same on every device."""
        signs = torch.randint(2, images.shape).to(images) * 2 - 1
        return (images + self.budget * signs).clamp(0, 1)
