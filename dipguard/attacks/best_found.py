"""Attacks that look at many attacked images and return the best one they saw, and the losses that they raise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dipguard.attacks.base import check_levels
from dipguard.attacks.target import AdaptiveAttack, DefendedVictim


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus that of the true class, above 0 where misclassified: [..., C], int [B] -> [...]."""
    true = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return logits.scatter(-1, true, -torch.inf).amax(dim=-1) - logits.gather(-1, true).squeeze(-1)


def mean_probability_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """-log of the true class's mean probability over the views, but for a constant: [V, B, C], int [B] -> [B]."""
    each = logits.log_softmax(dim=-1)
    return -each.gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1).logsumexp(dim=0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": mean_probability_ce,
    "margin": lambda logits, labels: margins(logits, labels).mean(dim=0),
}
"""Name -> loss [B] of logits [V, B, C] and labels int [B]."""


class BestFound:
    """The best attacked version of each of B images, among those that the defended victim was asked about.

    The version that was misclassified under more of the draws of its look is better; of equals, the one with the larger
    margin, mean over the draws. `history` counts, after each look, the images whose best version is classified
    correctly (under more than half of its draws), `last_history` those that were so when last looked at. ``flat``
    holds, for each gradient that was taken, whether it was zero, bool [B].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.given, self.labels, self.images = images, labels, images.clone()
        self.history: list[int] = []
        self.last_history: list[int] = []
        self.flat: list[Tensor] = []
        self._misread = torch.full(labels.shape, -1.0, dtype=torch.float32, device=labels.device)
        self._margin = torch.full_like(self._misread, -torch.inf)
        self._right = torch.ones_like(labels, dtype=torch.bool)

    @property
    def withstood(self) -> Tensor:
        """Whether each image's best version is still classified correctly, bool [B]."""
        return self._misread < 0.5

    def see(self, attacked: Tensor, logits: Tensor, *, rows: Tensor | None = None) -> None:
        """Note one look at images [n, 3, H, W], the ``rows`` int [n] (None: all), with logits [R, n, C] of R draws."""
        at = torch.arange(len(self.labels), device=self.labels.device) if rows is None else rows
        labels, scores = self.labels[at], logits.detach().to(self._margin)
        misread = (scores.argmax(dim=-1) != labels).float().mean(dim=0)
        margin = margins(scores, labels).mean(dim=0)
        ahead = (misread > self._misread[at]) | ((misread == self._misread[at]) & (margin > self._margin[at]))
        better = at[ahead]
        self.images[better] = attacked.detach()[ahead].to(self.images)
        self._misread[better], self._margin[better] = misread[ahead], margin[ahead]
        self._right[at] = misread < 0.5
        self.stay()

    def stay(self) -> None:
        """Take note of a step without a look: nothing has changed."""
        self.history.append(int(self.withstood.sum()))
        self.last_history.append(int(self._right.sum()))


def joined(counts: Sequence[Sequence[int]], *, total: int) -> list[float]:
    """Shares of all ``total`` images, from batches' counts after each look; a batch that ended early keeps its last."""
    steps = max(2, *(len(part) for part in counts))
    # The first look, at the start, is left out, unless it is the only one.
    whole = [[*part, *[part[-1]] * (steps - len(part))] for part in counts]
    return [sum(step) / total for step in zip(*whole, strict=True)][1:]


class DefendedSearch(AdaptiveAttack):
    """Looks at attacked images within ``eps_255`` levels of 0 to 255 (L-inf), and returns the best that it saw."""

    norm: str = "Linf"

    def __init__(self, target: DefendedVictim, *, eps_255: float = 8, draws: str = "fixed", **options: Any) -> None:
        super().__init__(target, draws=draws, **options)
        self.eps_255 = check_levels(eps_255, name="eps_255")

    @abstractmethod
    def search(self, found: BestFound, indices: Tensor) -> None:
        """Attack ``found.given``, and show ``found`` every look: the first at the start, then one a step."""

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Search, and return the best images found."""
        found = BestFound(images, labels)
        self.batches.append(found)
        self.search(found, indices)
        return found.images

    def finish(self, count: int) -> None:
        """Join the batches' histories and gradients."""
        self.history = joined([found.history for found in self.batches], total=count)
        self.last_history = joined([found.last_history for found in self.batches], total=count)
        flat = [flags for found in self.batches for flags in found.flat]
        self.flat = float(torch.cat(flat).float().mean()) if flat else None
        self.batches = []

    def into_ball(self, attacked: Tensor, given: Tensor) -> Tensor:
        """The nearest images within eps of the ``given`` ones and in [0, 1]."""
        return torch.clamp(given + torch.clamp(attacked - given, -self.eps, self.eps), 0, 1)
