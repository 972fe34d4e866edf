"""AutoAttack and its query part Square from torchattacks, for later use: what a defence must stand up to in the end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.libraries import torchattacks
from dipguard.attacks.torchattacks_base import LinfAttack
from dipguard.checks import check_choice, check_float, check_int
from dipguard.victims.base import check_victim

VERSIONS = {"standard": 4, "rand": 3}
"""AutoAttack's versions that are offered here, and the fewest classes that their losses are defined for."""

LOSSES = ("margin", "ce")


class Square(LinfAttack):
    """Square attack (Andriushchenko et al., 2020): random search by squares of colour, no gradients.

    torchattacks draws one square for all images of a batch, so batch mates influence each other.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        n_queries: most victim queries an image (and restart), at least 1.
        n_restarts: number of random restarts, at least 1.
        p_init: share of the pixels in the first squares, above 0 and at most 1.
        loss: ``margin`` or ``ce``, what is to fall.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "square"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)
        self.n_queries = check_int(n_queries, name="n_queries", low=1)
        self.n_restarts = check_int(n_restarts, name="n_restarts", low=1)
        self.p_init = check_float(p_init, name="p_init", low=0, high=1)
        if self.p_init == 0:
            raise ValueError("`p_init` must be above 0 and at most 1, got 0")
        self.loss = check_choice(loss, LOSSES, name="loss")

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, queries, restarts, squares and loss."""
        own = {"n_queries": self.n_queries, "n_restarts": self.n_restarts, "p_init": self.p_init, "loss": self.loss}
        return {**super().settings, **own}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' Square; it sets the global seed itself, so it is given the batch's."""
        return torchattacks().Square(
            victim,
            norm="Linf",
            eps=self.budget,
            n_queries=self.n_queries,
            n_restarts=self.n_restarts,
            p_init=self.p_init,
            loss=self.loss,
            seed=torch.initial_seed(),
        )


class AutoAttack(LinfAttack):
    """AutoAttack (Croce and Hein, 2020) in L-inf, as torchattacks has it; an attack goes to the next part if one fails.

    ``standard`` is APGD-CE, targeted APGD, targeted FAB and Square; ``rand``, for random victims, APGD-CE and APGD-DLR
    on gradients averaged over 20 looks. torchattacks runs 10 steps where the authors run 100: set ``steps`` to 100 for
    a figure that can stand beside theirs. Unseeded it would take the clock for a seed; here it takes the batch's.

    Args:
        victim: as in `Attack`; its number of classes, at least 4 (``rand``: 3), is read off its logits.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        version: ``standard`` or ``rand``.
        steps: steps of the parts that take gradients, at least 1.
        targets: most classes that the targeted parts try, the likeliest first, at least 1; the authors' 9.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "autoattack"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        version: str = "standard",
        steps: int = 10,
        targets: int = 9,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)
        self.version = check_choice(version, VERSIONS, name="version")
        self.steps = check_int(steps, name="steps", low=1)
        self.targets = check_int(targets, name="targets", low=1)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, version, steps and targets."""
        return {**super().settings, "version": self.version, "steps": self.steps, "targets": self.targets}

    def make(self, victim: nn.Module, *, num_classes: int = 10) -> Any:
        """Return torchattacks' AutoAttack on a victim of so many classes."""
        attack = torchattacks().AutoAttack(
            victim,
            norm="Linf",
            eps=self.budget,
            version=self.version,
            n_classes=min(num_classes, self.targets + 1),
            seed=torch.initial_seed(),
        )
        for part in attack._autoattack.attacks:
            if hasattr(part, "steps"):  # Square counts queries
                part.steps = self.steps
        return attack

    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run torchattacks' AutoAttack on one batch."""
        num_classes = check_victim(self.victim, images[:1]).shape[1]
        least = VERSIONS[self.version]
        if num_classes < least:
            raise ValueError(f"`victim` must have at least {least} classes for {self.version!r}, got {num_classes}")
        attacked: Tensor = self.make(self.view(self.victim), num_classes=num_classes)(images, labels)
        return attacked
