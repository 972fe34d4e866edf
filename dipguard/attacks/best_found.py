"""Attacks that look at many attacked images and return the best one they saw, and the losses that they raise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dipguard.attacks.base import Cost
from dipguard.attacks.target import FINAL, AdaptiveAttack, DefendedVictim, fresh_indices
from dipguard.checks import check_int, check_positive

CANDIDATES = 4
"""Versions of an image that are looked at again, at most."""


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
    margin, mean over the draws; of equals, the first. ``top`` [K, B, 3, H, W] are the ``keep`` best, and ``seen``, bool
    [K, B], says which of them there are. `history` counts, after each look, the images whose best version is classified
    correctly (under more than half of its draws), `last_history` those that were so when last looked at. ``flat``
    holds, for each gradient that was taken, whether it was zero, bool [B].
    """

    def __init__(self, images: Tensor, labels: Tensor, *, keep: int = 1) -> None:
        self.given, self.labels, self.top = images, labels, images.repeat(keep, 1, 1, 1, 1)
        self.history: list[int] = []
        self.last_history: list[int] = []
        self.flat: list[Tensor] = []
        self._misread = torch.full((keep, len(labels)), -1.0, dtype=torch.float32, device=labels.device)
        self._margin = torch.full_like(self._misread, -torch.inf)
        self._right = torch.ones_like(labels, dtype=torch.bool)

    @property
    def seen(self) -> Tensor:
        """Which of ``top`` were looked at."""
        return self._misread >= 0

    @property
    def withstood(self) -> Tensor:
        """Whether each image's best version is still classified correctly, bool [B]."""
        return self._misread[0] < 0.5

    def see(self, attacked: Tensor, logits: Tensor, *, rows: Tensor | None = None) -> None:
        """Note one look at images [n, 3, H, W], the ``rows`` int [n] (None: all), with logits [R, n, C] of R draws."""
        at = torch.arange(len(self.labels), device=self.labels.device) if rows is None else rows
        labels, scores = self.labels[at], logits.detach().to(self._margin)
        misread = (scores.argmax(dim=-1) != labels).float().mean(dim=0)
        margin = margins(scores, labels).mean(dim=0)
        own, mark = self._misread[:, at], self._margin[:, at]
        place = ((own > misread) | ((own == misread) & (mark >= margin))).sum(dim=0)
        news = ((self.top, attacked.detach().to(self.top)), (self._misread, misread), (self._margin, margin))
        for k in reversed(range(len(self.top))):
            for kept, new in news:
                kept[k, at[place < k]] = kept[k - 1, at[place < k]]  # one place down
                kept[k, at[place == k]] = new[place == k]
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
    """Looks at attacked images within ``eps_255`` levels of 0 to 255 (L-inf), and returns the best that it saw.

    With ``final_looks`` above 0, the `CANDIDATES` best are judged again under that many fresh draws, the same ones for
    each, and the one that is misclassified under most of them is returned; of equals, the one that was better before.
    """

    def __init__(
        self, target: DefendedVictim, *, eps_255: float = 8, draws: str = "fixed", final_looks: int = 0, **options: Any
    ) -> None:
        super().__init__(target, draws=draws, **options)
        self.eps_255 = check_positive(eps_255, name="eps_255", high=255)
        self.final_looks = check_int(final_looks, name="final_looks", low=0)

    @abstractmethod
    def search(self, found: BestFound, indices: Tensor) -> None:
        """Attack ``found.given``, and show ``found`` every look: the first at the start, then one a step."""

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Search, and return the best images found."""
        found = BestFound(images, labels, keep=CANDIDATES if self.final_looks else 1)
        self.batches.append(found)
        self.search(found, indices)
        return self._looked_at_again(found, indices) if self.final_looks else found.top[0]

    def final_cost(self, count: int) -> Cost:
        """Cost of the final looks at the versions of ``count`` images, at most."""
        return self.target.cost(purifications=count * CANDIDATES * self.final_looks)

    def _looked_at_again(self, found: BestFound, indices: Tensor) -> Tensor:
        """Of each image's best versions the one that fools the victim under most of the final looks."""
        places, at = torch.nonzero(found.seen, as_tuple=True)
        asked, images, labels = indices[at.to(indices.device)], found.top[places, at], found.labels[at]
        fooled = torch.zeros(found.seen.shape, dtype=torch.int64, device=labels.device)
        for look in range(FINAL, FINAL + self.final_looks):
            with torch.no_grad():
                fooled[places, at] += self.decide(images, fresh_indices(asked, look)) != labels
            self.spent += self.target.cost(purifications=len(at))
        best = fooled.argmax(dim=0)  # of equals the first; place 0 was always looked at
        return found.top[best, torch.arange(len(best), device=labels.device)]

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
