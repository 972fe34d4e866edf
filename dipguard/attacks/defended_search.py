"""What the attacks that climb or search inside an L-inf ball around a defended victim's images share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.attacks.best_found import BestFound, joined
from dipguard.attacks.defense_aware import DefenseAwareAttack, Purifies
from dipguard.attacks.torchattacks_base import check_levels


class DefendedSearch(DefenseAwareAttack):
    """Looks at attacked images through defence and victim, step by step, and returns the best that it saw.

    A subclass sets ``name`` and implements `search`.

    Args:
        victim: as in `DefenseAwareAttack`.
        defense: as in `DefenseAwareAttack`.
        eps_255: radius of the L-inf ball in levels of 0 to 255, above 0.
        draws: as in `DefenseAwareAttack`.
        seed: as in `DefenseAwareAttack`.
        batch_size: as in `DefenseAwareAttack`.

    Attributes:
        history: After a call, share of its images whose best so far is still read rightly (under the draws that were
            seen) after step 1, 2, ...; it never rises.
        last_history: Share that was read rightly at each step itself.
    """

    norm: str = "Linf"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float,
        draws: str,
        seed: int,
        batch_size: int,
    ) -> None:
        super().__init__(victim, defense, draws=draws, seed=seed, batch_size=batch_size)
        self.eps_255 = check_levels(eps_255, name="eps_255")
        self.history: list[float] = []
        self.last_history: list[float] = []

    @property
    def budget(self) -> float:
        """eps on the [0, 1] scale."""
        return self.eps_255 / 255

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefenseAwareAttack`, with eps."""
        return {**super().settings, "eps_255": self.eps_255}

    @abstractmethod
    def search(self, found: BestFound, indices: Tensor) -> None:
        """Attack ``found.given`` with the true classes ``found.labels``, and show ``found`` every look.

        The first look is at the start; the others are the steps.
        """

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return the best attacked images that were seen, of the same shape, dtype and device, in [0, 1], detached.

        Args:
            images: float [N, 3, H, W] in [0, 1], not purified.
            labels: int [N], the true classes.
            indices: int [N], positions in the whole data set; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels or indices.
            RuntimeError: the defence or the attack broke its promise.
        """
        batches: list[BestFound] = []

        def attack(x: Tensor, y: Tensor, positions: Tensor) -> list[Tensor]:
            batches.append(BestFound(x, y))
            self.search(batches[-1], positions)
            return [batches[-1].images]

        (attacked,) = self.run_batches(images, labels, indices, attack)
        self.history = joined([found.history for found in batches], total=len(images))
        self.last_history = joined([found.last_history for found in batches], total=len(images))
        return attacked

    def into_ball(self, attacked: Tensor, given: Tensor) -> Tensor:
        """The nearest images within eps of the ``given`` ones and in [0, 1]."""
        return torch.clamp(given + torch.clamp(attacked - given, -self.budget, self.budget), 0, 1)
