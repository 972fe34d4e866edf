"""What an attack has seen so far: the best attacked image of each, and how many are still withstood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipguard.attacks.view_losses import margins


class BestFound:
    """The best attacked version of each of B images among those that the defended victim was asked about.

    Better is what more of the draws seen at one look were misread under; of equals, what was misread by the larger
    margin (largest other logit minus the true class's, mean over the draws). With ``fixed`` draws, whatever was ever
    misread is so again at the evaluation, and the margin guards it against rounding.

    Args:
        images: [B, 3, H, W], what to attack.
        labels: int [B], the true classes.

    Attributes:
        images: the best so far, [B, 3, H, W]; before any look, the given ones.
        history: images whose best so far is read rightly (under more than half of its draws) after each look.
        last_history: images that were read rightly when they were last looked at, after each look.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.given = images
        self.labels = labels
        self.images = images.clone()
        self.history: list[int] = []
        self.last_history: list[int] = []
        self._misread = torch.full(labels.shape, -1.0, device=labels.device)
        self._margin = torch.full_like(self._misread, -torch.inf)
        self._right = torch.ones_like(labels, dtype=torch.bool)

    @property
    def withstood(self) -> Tensor:
        """Whether each image's best so far is still read rightly, bool [B]."""
        return self._misread < 0.5

    def see(self, attacked: Tensor, logits: Tensor, *, rows: Tensor | None = None) -> None:
        """Take note of one look.

        Args:
            attacked: [n, 3, H, W], what was looked at.
            logits: the victim's on the defence's answers, [R, n, C], for R draws.
            rows: which images they are, int [n], each once; by default all of them.
        """
        at = torch.arange(len(self.labels), device=self.labels.device) if rows is None else rows
        labels, scores = self.labels[at], logits.detach().to(self._margin)
        misread = (scores.argmax(dim=-1) != labels).float().mean(dim=0)
        margin = margins(scores, labels.expand(len(scores), -1)).mean(dim=0)
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
    """Shares of all ``total`` images, from batches' counts after each look; one that ended early keeps its last.

    The first look, at the start, is no step; it stands for the first step where there was none.
    """
    steps = max(2, *(len(part) for part in counts))
    whole = [[*part, *[part[-1]] * (steps - len(part))] for part in counts]
    return [sum(step) / total for step in zip(*whole, strict=True)][1:]
