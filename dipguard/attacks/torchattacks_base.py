"""What the attacks of torchattacks (Kim, 2020) share behind dipguard's `Attack`.

What `Attack` and this file make up for in torchattacks 3.5.1: it raises under ``no_grad``, leaves BatchNorms that
were in eval mode in train mode, fixes the device when constructed, adds to the victim's gradients, and takes any eps
without complaint.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.attacks.base import Attack
from dipguard.attacks.libraries import VictimView, torchattacks
from dipguard.checks import check_float


def check_levels(value: float, *, name: str) -> float:
    """Return a pixel distance in levels of 0 to 255 (not in [0, 1]) if it is above 0 and at most 255.

    Raises:
        TypeError, ValueError: it is not.
    """
    number = check_float(value, name=name, low=0, high=255)
    if number == 0:
        raise ValueError(f"`{name}` must be above 0 and at most 255 (levels of 0 to 255), got {value}")
    return number


class TorchAttack(Attack):
    """An attack of torchattacks; the library's object is made anew for each batch, on the victim's device."""

    view: ClassVar[type[VictimView]] = VictimView

    def __init__(self, victim: nn.Module, *, seed: int, batch_size: int) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self._version = str(torchattacks().__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """The attack's options in the units of this class, with the library and its version."""
        return {**super().settings, "library": "torchattacks", "library_version": self._version, "targeted": False}

    @abstractmethod
    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' attack on ``victim``."""

    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run torchattacks' attack on one batch."""
        attacked: Tensor = self.make(self.view(self.victim))(images, labels)
        return attacked


class LinfAttack(TorchAttack):
    """An attack of torchattacks inside the L-inf ball of radius eps."""

    norm: str = "Linf"

    def __init__(self, victim: nn.Module, *, eps_255: float, seed: int, batch_size: int) -> None:
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
