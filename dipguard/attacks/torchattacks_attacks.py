"""FGSM, PGD and C&W from the library torchattacks (Kim, 2020), with its defaults, behind dipguard's `Attack`.

What `Attack` and this file make up for in torchattacks 3.5.1: it raises under ``no_grad``, leaves BatchNorms that
were in eval mode in train mode, fixes the device when constructed, adds to the victim's gradients, takes any eps
without complaint, and its C&W objective is wrong for negative logits (see `_LogitsAboveZero`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.base import Attack
from dipguard.checks import check_float, check_int
from dipguard.classifier import device_of


def _library() -> Any:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(
            f"this attack needs the library torchattacks, which could not be imported ({error}): "
            "pip install 'dipguard[attacks]'"
        ) from error
    return torchattacks


def _levels(value: float, *, name: str) -> float:
    """Check a pixel distance in levels of 0 to 255 (not in [0, 1]): above 0, at most 255."""
    number = check_float(value, name=name, low=0, high=255)
    if number == 0:
        raise ValueError(f"`{name}` must be above 0 and at most 255 (levels of 0 to 255), got {value}")
    return number


class _Victim(nn.Module):
    """The victim as torchattacks sees it: its mode switching and device guess end here."""

    def __init__(self, victim: nn.Module) -> None:
        super().__init__()
        # torchattacks takes the first parameter's device, and prints a complaint where there is none.
        self.device_marker = nn.Parameter(torch.empty(0, device=device_of(victim)), requires_grad=False)
        self.victim = victim
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.victim(images)
        return logits


class _LogitsAboveZero(_Victim):
    """Adds a constant to each image's logits, so that the lowest is 0: decisions and margins stay as they are.

    torchattacks' C&W finds the best other class as the maximum of logits with the true class's set to 0. Where all
    others are negative, that finds the 0: the attack then pushes the true logit below 0 instead of below its rivals.
    """

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits - logits.detach().amin(dim=1, keepdim=True)


class _TorchAttack(Attack):
    """An attack of torchattacks; the library's object is made anew for each batch, on the victim's device."""

    view: ClassVar[type[_Victim]] = _Victim

    def __init__(self, victim: nn.Module, *, seed: int, batch_size: int) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self._version = str(_library().__version__)

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


class _LinfAttack(_TorchAttack):
    """An attack of torchattacks inside the L-inf ball of radius eps."""

    norm: ClassVar[str] = "Linf"

    def __init__(self, victim: nn.Module, *, eps_255: float, seed: int, batch_size: int) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.eps_255 = _levels(eps_255, name="eps_255")

    @property
    def budget(self) -> float:
        """eps on the [0, 1] scale."""
        return self.eps_255 / 255

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps."""
        return {**super().settings, "eps_255": self.eps_255}


class FGSM(_LinfAttack):
    """Fast gradient sign method (Goodfellow et al., 2015): one step of size eps in L-inf.

    Args:
        victim: as in `Attack`.
        eps_255: step size in levels of 0 to 255, above 0; fractions are allowed.
        seed: as in `Attack`; FGSM draws nothing.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "fgsm"

    def __init__(self, victim: nn.Module, *, eps_255: float = 8, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' FGSM."""
        return _library().FGSM(victim, eps=self.budget)


class PGD(_LinfAttack):
    """Projected gradient descent (Madry et al., 2018) in the L-inf ball, from a random start.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        random_start: start at a uniformly drawn point of the ball, not at the image.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "pgd"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 10,
        random_start: bool = True,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)
        self.alpha_255 = _levels(alpha_255, name="alpha_255")
        self.steps = check_int(steps, name="steps", low=1)
        self.random_start = bool(random_start)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, step size, steps and start."""
        own = {"alpha_255": self.alpha_255, "steps": self.steps}
        return {**super().settings, **own, "random_start": self.random_start}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' PGD."""
        return _library().PGD(
            victim, eps=self.budget, alpha=self.alpha_255 / 255, steps=self.steps, random_start=self.random_start
        )


class CW(_TorchAttack):
    """Carlini and Wagner's L2 attack (2017), in tanh space, with a fixed c (torchattacks has no binary search for it).

    Images that it cannot fool come back unchanged; pixels at exactly 0 or 1 never move (tanh cannot leave its limits).
    It stops early when the summed cost of the whole batch rises, so an image's result depends on its batch mates: keep
    ``batch_size`` and the order of the images fixed to compare results.

    Args:
        victim: as in `Attack`.
        c: weight of the misclassification term against the squared L2 distance, above 0.
        kappa: confidence, the logit margin aimed at, at least 0.
        steps: number of Adam steps, at least 1.
        lr: Adam's learning rate, above 0.
        seed: as in `Attack`; C&W draws nothing.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "cw"
    norm: ClassVar[str] = "L2"
    view: ClassVar[type[_Victim]] = _LogitsAboveZero

    def __init__(
        self,
        victim: nn.Module,
        *,
        c: float = 1,
        kappa: float = 0,
        steps: int = 50,
        lr: float = 0.01,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.c = check_float(c, name="c", low=0)
        self.kappa = check_float(kappa, name="kappa", low=0)
        self.steps = check_int(steps, name="steps", low=1)
        self.lr = check_float(lr, name="lr", low=0)
        for name, value in (("c", self.c), ("lr", self.lr)):
            if value == 0:
                raise ValueError(f"`{name}` must be above 0, got 0")

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with c, kappa, steps and learning rate."""
        return {**super().settings, "c": self.c, "kappa": self.kappa, "steps": self.steps, "lr": self.lr}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' C&W."""
        return _library().CW(victim, c=self.c, kappa=self.kappa, steps=self.steps, lr=self.lr)
